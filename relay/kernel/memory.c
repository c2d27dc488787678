/* Memory: the cut that makes pages final, gathering lends, and shared pages put in place of private ones.
 *
 * Facts (man 2 mremap, vmsplice):
 * - mremap with MREMAP_DONTUNMAP (Linux 5.7) takes the pages of a private anonymous mapping elsewhere and
 *   leaves the old addresses mapped and empty: whoever still holds one reads zeros and writes to fresh pages.
 *   It happens at one instant for all threads, and works on locked memory. From Linux 5.13 on shared mappings
 *   move as well, and the old addresses then go on to show the same file.
 * - A copy larger than the caches is fastest by `rep movsb` where the CPU has it enhanced (ERMS, CPUID 7): it does not
 *   read the lines that it will overwrite. Measured on 64 MiB: 2.4 ms, memcpy 3.4 ms, streaming stores 2.8 ms.
 * - vmsplice takes at most 1024 pieces a call, and each costs a slot of the pipe for every page it touches.
 * - MADV_COLLAPSE (Linux 6.1) makes huge pages of what is mapped, whatever shmem_enabled says but "deny". It passes over
 *   a stretch of 2 MiB without a single page; one is enough, the others need not be allocated, only to be cleared. The
 *   mapping must be aligned as the file is. */
#include "calls.h"

#include <string.h>
#include <sys/mman.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

#define HUGE_PAGE (2 << 20)
#define PIECES 1024
#define LARGE_COPY (8 << 20)    /* bytes that no cache keeps */

int relay_cut(char *from, char *to, int64_t size, int writable)
{
    void *moved = mremap(from, (size_t)size, (size_t)size, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to);

    if (moved == MAP_FAILED)
        return -errno;
    /* What is final is read-only as well: a stray pointer faults rather than changing what was lent. The pages have
     * moved already, so a refusal is no failure: nobody knows where they are. */
    if (!writable)
        (void)mprotect(to, (size_t)size, PROT_READ);
    return 0;
}

int64_t relay_lend_pieces(int pipe_w, const char *base, const int64_t *pieces, int count)
{
    struct iovec vector[PIECES];
    ssize_t n;
    int i;

    if (count > PIECES)
        count = PIECES;
    for (i = 0; i < count; i++) {
        vector[i].iov_base = (void *)(uintptr_t)(base + pieces[2 * i]);
        vector[i].iov_len = (size_t)pieces[2 * i + 1];
    }
    do n = vmsplice(pipe_w, vector, (size_t)count, SPLICE_F_NONBLOCK);
    while (n < 0 && errno == EINTR);
    return result(n);
}

int relay_map_over(char *at, int64_t size, int fd, int64_t offset, int writable)
{
    int protection = PROT_READ | (writable ? PROT_WRITE : 0);
    int kind = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : writable == RELAY_OWN_COPY ? MAP_PRIVATE : MAP_SHARED;
    void *mapped = mmap(at, (size_t)size, protection, kind | MAP_FIXED, fd, (off_t)offset);

    if (mapped == MAP_FAILED && errno == EPERM && !writable)    /* before Linux 6.7 a seal on writing forbids MAP_SHARED */
        mapped = mmap(at, (size_t)size, protection, MAP_PRIVATE | MAP_FIXED, fd, (off_t)offset);
    return mapped == MAP_FAILED ? -errno : 0;
}

int relay_enlarge(char *at, int64_t size, int fd, int64_t offset)
{
    int64_t whole = size - size % HUGE_PAGE, done;
    ssize_t n;

    if ((uintptr_t)at % HUGE_PAGE || offset % HUGE_PAGE || !whole)
        return -EINVAL;
    for (done = 0; done < whole; done += HUGE_PAGE) {
        do n = pwrite(fd, "", 1, (off_t)(offset + done));    /* where a mapping would fault, this is an error */
        while (n < 0 && errno == EINTR);
        if (n < 0)
            return -errno;
    }
    return madvise(at, (size_t)whole, MADV_COLLAPSE) ? -errno : 0;
}

int relay_occupy(char *at, int64_t size)
{
    void *mapped = mmap(at, (size_t)size, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);

    if (mapped == MAP_FAILED)
        return -errno;
    if (mapped == at)
        return 0;
    (void)munmap(mapped, (size_t)size);     /* before Linux 4.17 an address is only a wish */
    return -EEXIST;
}

void relay_vacate(char *at, int64_t size)
{
    (void)munmap(at, (size_t)size);
}

static int moves_bytes_well(void)
{
#if defined(__x86_64__)
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & 1u << 9);
#else
    return 0;
#endif
}

void relay_copy(char *to, const char *from, int64_t size)
{
#if defined(__x86_64__)
    if (size >= LARGE_COPY && moves_bytes_well()) {
        __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
        return;
    }
#endif
    (void)moves_bytes_well;
    memcpy(to, from, (size_t)size);
}
