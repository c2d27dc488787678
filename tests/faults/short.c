/* Makes system calls come short at random, seeded: LD_PRELOAD this library.
 *
 * Only lengths are changed: the kernel gets a smaller count and everything it answers is true. So whatever
 * goes wrong under this library would go wrong some day without it. For the same reason nothing is shortened
 * where a caller may rely on getting all: datagrams, counters and events (eventfd, timerfd, signalfd,
 * inotify), writes of up to PIPE_BUF bytes into a pipe, and anything opened with O_DIRECT.
 *
 *   FAULT_CALLS   names from the table below, with commas; "all" for every one. Default: none
 *   FAULT_SEED    a number; the same seed gives the same decisions for the same sequence of calls. Default 1
 *   FAULT_RATE    chance in percent that a call is shortened, 0 to 100. Default 20
 *   FAULT_EINTR   chance in percent that a call answers EINTR before anything moved. Default 0
 *   FAULT_COUNTS  an existing file of at least CALLS * 3 * 8 bytes, mapped and shared by all processes:
 *                 for each call in table order the number of calls, shortened ones, interrupted ones
 *
 * Calls go to the kernel by syscall(), so nothing here depends on which library comes next. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum call { SPLICE, TEE, VMSPLICE, SENDFILE, SEND, RECV, READ, WRITE, CALLS };
static const char *const names[CALLS] = {"splice", "tee", "vmsplice", "sendfile", "send", "recv", "read", "write"};

struct counts { _Atomic uint64_t calls, shortened, interrupted; };

static struct counts own[CALLS];
static struct counts *counts = own;
static _Atomic uint64_t sequence[CALLS]; /* this process's calls: what decisions are made of */
static int chosen[CALLS];
static uint64_t seed = 1;
static unsigned rate = 20, eintr = 0;

static unsigned number(const char *name, unsigned otherwise)
{
    const char *text = getenv(name);
    return text && *text ? (unsigned)strtoul(text, NULL, 10) : otherwise;
}

static void __attribute__((constructor)) begin(void)
{
    const char *calls = getenv("FAULT_CALLS");
    for (int i = 0; calls && i < CALLS; i++) {
        size_t length = strlen(names[i]);
        chosen[i] = strcmp(calls, "all") == 0;
        for (const char *at = calls; (at = strstr(at, names[i])); at += length)
            if ((at == calls || at[-1] == ',') && (at[length] == 0 || at[length] == ','))
                chosen[i] = 1; /* "splice" is no match inside "vmsplice" */
    }
    seed = number("FAULT_SEED", 1);
    rate = number("FAULT_RATE", 20);
    eintr = number("FAULT_EINTR", 0);
    const char *path = getenv("FAULT_COUNTS");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd >= 0) {
        void *shared = mmap(NULL, sizeof own, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (shared != MAP_FAILED)
            counts = shared;
        close(fd);
    }
}

static uint64_t mix(uint64_t x) /* a finalizer in the manner of splitmix64: neighbours come out unrelated */
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* Whether it is fair to shorten this call on fd. */
static int fair(enum call call, int fd, size_t length)
{
    struct stat status;
    int type = 0, saved = errno, yes = 1;
    socklen_t size = sizeof type;
    if (fstat(fd, &status) < 0)
        yes = 0;
    else if (S_ISSOCK(status.st_mode))
        yes = getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && type == SOCK_STREAM;
    else if (S_ISFIFO(status.st_mode))
        yes = call != WRITE || length > PIPE_BUF;
    else
        yes = S_ISREG(status.st_mode) || ((S_ISCHR(status.st_mode) || S_ISBLK(status.st_mode)) && call != READ);
    int flags = yes ? fcntl(fd, F_GETFL) : 0;
    if (flags & O_DIRECT)
        yes = 0;
    errno = saved;
    return yes;
}

/* The length to pass on, 1 to length; 0 stands for "answer EINTR". `out` is the other descriptor or -1. */
static size_t decide(enum call call, int fd, int out, size_t length)
{
    if (!chosen[call])
        return length;
    uint64_t nth = atomic_fetch_add(&sequence[call], 1);
    atomic_fetch_add(&counts[call].calls, 1);
    uint64_t roll = mix(seed * 0x9e3779b97f4a7c15u + mix(nth * CALLS + call + 1));
    if (roll % 100 < eintr) {
        atomic_fetch_add(&counts[call].interrupted, 1);
        return 0;
    }
    roll = mix(roll + 1);
    if (roll % 100 >= rate || length < 2 || !fair(call, fd, length) || (out >= 0 && !fair(call, out, length)))
        return length;
    atomic_fetch_add(&counts[call].shortened, 1);
    /* A random number of bits first: callers ask for far more than there is, so small counts must be as
     * likely as large ones for the result to come short. */
    roll = mix(roll + 2);
    unsigned bits = 64 - (unsigned)__builtin_clzll(length - 1);
    uint64_t ceiling = (uint64_t)1 << (1 + roll % bits);
    roll = mix(roll + 3);
    return 1 + roll % (ceiling < length - 1 ? ceiling : length - 1);
}

#define INTERRUPTED(length, asked) ((length) == 0 && (asked) != 0 ? (errno = EINTR, 1) : 0)

ssize_t splice(int in, off64_t *in_at, int out, off64_t *out_at, size_t asked, unsigned flags)
{
    size_t length = decide(SPLICE, in, out, asked);
    return INTERRUPTED(length, asked) ? -1 : syscall(SYS_splice, in, in_at, out, out_at, length, flags);
}

ssize_t tee(int in, int out, size_t asked, unsigned flags)
{
    size_t length = decide(TEE, in, out, asked);
    return INTERRUPTED(length, asked) ? -1 : syscall(SYS_tee, in, out, length, flags);
}

ssize_t vmsplice(int fd, const struct iovec *vector, size_t count, unsigned flags)
{
    struct iovec shorter[IOV_MAX];
    size_t asked = 0, kept = 0;
    if (count == 0 || count > IOV_MAX)
        return syscall(SYS_vmsplice, fd, vector, count, flags);
    for (size_t i = 0; i < count; i++)
        asked += vector[i].iov_len;
    size_t length = decide(VMSPLICE, fd, -1, asked);
    if (INTERRUPTED(length, asked))
        return -1;
    if (length == asked)
        return syscall(SYS_vmsplice, fd, vector, count, flags);
    for (; length > 0; length -= shorter[kept++].iov_len) {
        shorter[kept] = vector[kept];
        if (shorter[kept].iov_len > length)
            shorter[kept].iov_len = length;
    }
    return syscall(SYS_vmsplice, fd, shorter, kept, flags);
}

ssize_t sendfile(int out, int in, off_t *at, size_t asked)
{
    size_t length = decide(SENDFILE, in, out, asked);
    return INTERRUPTED(length, asked) ? -1 : syscall(SYS_sendfile, out, in, at, length);
}

ssize_t sendfile64(int out, int in, off64_t *at, size_t asked)
{
    return sendfile(out, in, at, asked);
}

ssize_t send(int fd, const void *data, size_t asked, int flags)
{
    size_t length = decide(SEND, fd, -1, asked);
    return INTERRUPTED(length, asked) ? -1 : syscall(SYS_sendto, fd, data, length, flags, NULL, 0);
}

ssize_t recv(int fd, void *data, size_t asked, int flags)
{
    size_t length = decide(RECV, fd, -1, asked);
    return INTERRUPTED(length, asked) ? -1 : syscall(SYS_recvfrom, fd, data, length, flags, NULL, NULL);
}

ssize_t read(int fd, void *data, size_t asked)
{
    size_t length = decide(READ, fd, -1, asked);
    return INTERRUPTED(length, asked) ? -1 : syscall(SYS_read, fd, data, length);
}

ssize_t write(int fd, const void *data, size_t asked)
{
    size_t length = decide(WRITE, fd, -1, asked);
    return INTERRUPTED(length, asked) ? -1 : syscall(SYS_write, fd, data, length);
}
