/* The thread's side of a ferry, and the thin calls.
 *
 * Facts (fs/splice.c, fs/pipe.c): while a splice on a pipe blocks, the pipe's mutex is held, and any other
 * call on it hangs in uninterruptible sleep. Regular files are never "not ready": a write to one may block
 * for seconds in writeback. So the engine fills a pipe that is its own, hands it over whole, and does not
 * touch it until it comes back empty. */
#include "calls.h"

#include <poll.h>
#include <sched.h>
#include <time.h>
#include <sys/vfs.h>

/* A folio of the page cache is at most as large as the write that makes it. Up to 32 KiB the kernel has them at hand
 * (PAGE_ALLOC_COSTLY_ORDER); larger ones are cut out of blocks of 2 MiB, which a virtual machine may have given back to
 * its host (free page reporting), and then the first touch costs ten times the copy. Which it is changes from second to
 * second with what else the machine frees. So both are measured, as the thread's CPU time of a load, and looked at
 * again every now and then. */
#define RELAY_PUT (128 << 10)
#define RELAY_SMALL_PUT (32 << 10)
#define LOOKS 2             /* loads by each size, to compare them */
#define SOONEST 48          /* loads until that is done again, twice as many each time that nothing has changed, */
#define LATEST 384          /* up to so many */
#define TELLS (256 << 10)   /* bytes of a load that tells anything */
#define EXT4_MAGIC 0xEF53

static int64_t take_knock(struct relay_ferry *f)
{
    uint64_t count;
    while (read(f->knock, &count, sizeof count) < 0)
        if (errno != EINTR)
            return -errno;
    return 0;
}

static void answer(struct relay_ferry *f)
{
    uint64_t one = 1;
    while (write(f->answer, &one, sizeof one) < 0 && errno == EINTR) {}
}

static int64_t next_load(struct relay_ferry *f, int looks)
{
    for (;;) {
        /* `ending` is read first: the last load was handed over before it was set */
        int ending = __atomic_load_n(&f->ending, __ATOMIC_ACQUIRE);
        if (looks && __atomic_exchange_n(&f->look, 0, __ATOMIC_ACQ_REL))
            return -EINTR;
        if (__atomic_load_n(&f->turn[f->away], __ATOMIC_ACQUIRE) == RELAY_WITH_THREAD) {
            if (f->tag[f->away] && !f->clock_ns)
                f->clock_ns = cpu_ns();
            return f->load[f->away];
        }
        if (ending)
            return 0;
        int64_t failed = take_knock(f);
        if (failed)
            return failed;
    }
}

int64_t relay_ferry_wait(struct relay_ferry *f) { return next_load(f, 0); }

void relay_ferry_give_back(struct relay_ferry *f)
{
    int k = f->away;
    int64_t now = f->tag[k] ? cpu_ns() : 0;
    f->took_ns[k] = now - f->clock_ns;
    f->clock_ns = now;
    f->load[k] = 0;
    f->away ^= 1;
    __atomic_store_n(&f->turn[k], RELAY_WITH_ENGINE, __ATOMIC_SEQ_CST);
    if (__atomic_exchange_n(&f->asked, 0, __ATOMIC_SEQ_CST))
        answer(f);
}

void relay_ferry_nudge(struct relay_ferry *f)
{
    uint64_t one = 1;
    __atomic_store_n(&f->look, 1, __ATOMIC_RELEASE);
    while (write(f->knock, &one, sizeof one) < 0 && errno == EINTR) {}
}

void relay_ferry_end(struct relay_ferry *f)
{
    uint64_t one = 1;
    int k = f->at;
    /* whose it is comes first: the load of a pipe that the thread has is the thread's to read */
    if (__atomic_load_n(&f->turn[k], __ATOMIC_ACQUIRE) == RELAY_WITH_ENGINE && f->load[k]) {
        f->at ^= 1;
        f->tag[k] = 0;
        __atomic_store_n(&f->turn[k], RELAY_WITH_THREAD, __ATOMIC_RELEASE);
    }
    __atomic_store_n(&f->ending, 1, __ATOMIC_RELEASE);
    while (write(f->knock, &one, sizeof one) < 0 && errno == EINTR) {}
}

/* An end is nonblocking when whoever gave it to us made it so (the flag is shared): we wait for it ourselves. */
static void wait_for_room(struct relay_ferry *f)
{
    struct pollfd one = { .fd = f->fd, .events = POLLOUT };
    while (poll(&one, 1, -1) < 0 && errno == EINTR) {}
}

static void counted(struct relay_ferry *f) { __atomic_fetch_add(&f->calls, 1, __ATOMIC_RELAXED); }

static int64_t write_by(struct relay_ferry *f, const char *from, int64_t size, int64_t most)
{
    int64_t done = 0;
    while (done < size) {
        int64_t n = call_write(f->fd, 0, from + done, size - done < most ? size - done : most);
        counted(f);
        if (n == -EAGAIN) {
            wait_for_room(f);
            continue;
        }
        if (n <= 0)
            return n ? n : -EIO;
        done += n;
        __atomic_fetch_add(&f->moved, n, __ATOMIC_RELAXED);
    }
    return done;
}

/* Both sizes were looked at. */
static void choose(struct relay_ferry *f)
{
    double large = (double)f->costs[0] / (double)f->sizes[0], little = (double)f->costs[1] / (double)f->sizes[1];
    int small = little < large * 0.9;
    f->again = small != f->small || !f->again ? SOONEST : 2 * f->again < LATEST ? 2 * f->again : LATEST;
    f->small = small;
}

static int64_t write_whole(struct relay_ferry *f, const char *from, int64_t size)
{
    int look = size >= TELLS && f->seen < 2 * LOOKS, small = look && f->seen >= LOOKS ? !f->small : f->small;
    int64_t began = look ? cpu_ns() : 0, n;
    if (look && !f->seen)
        f->costs[0] = f->costs[1] = f->sizes[0] = f->sizes[1] = 0;
    n = write_by(f, from, size, small ? RELAY_SMALL_PUT : RELAY_PUT);
    if (look) {
        f->costs[small] += cpu_ns() - began;
        f->sizes[small] += size;
    }
    if (size >= TELLS && ++f->seen == 2 * LOOKS)
        choose(f);
    if (f->seen >= f->again + 2 * LOOKS)
        f->seen = 0;
    return n;
}

int relay_reserving_pays(int fd)
{
    struct statfs about;
    return fstatfs(fd, &about) == 0 && about.f_type == EXT4_MAGIC;
}

/* Blocks for what is to be written, and some more, at once: ext4 else accounts for each block of 4 KiB as it comes,
 * a third of what writing to the page cache costs. The file's size stays as it is; whoever closes it gives back
 * what it did not need. A file of a few MiB is left alone, and where it cannot be done it is not. */
static void reserve(struct relay_ferry *f, int64_t size)
{
    int64_t at;
    if (!f->ahead || f->moved < f->ahead)
        return;
    at = lseek(f->fd, 0, SEEK_CUR);
    if (at >= 0 && at + size <= f->reserved)
        return;
    counted(f);
    if (at < 0 || fallocate(f->fd, FALLOC_FL_KEEP_SIZE, at, size + f->ahead) < 0)
        f->ahead = 0;
    else
        f->reserved = at + size + f->ahead;
}

int relay_ferry_run(struct relay_ferry *f)
{
    for (;;) {
        int64_t load = next_load(f, 1), n = 0;
        if (load <= 0)
            return (int)load;
        reserve(f, load);
        while (f->load[f->away]) {
            int from = f->pipe_r[f->away];
            load = f->load[f->away];
            if (f->span[f->away]) {
                n = write_whole(f, f->span[f->away], load);
            } else if (f->method == RELAY_SPLICE) {
                do n = result(splice(from, NULL, f->fd, NULL, (size_t)(load < RELAY_PUT ? load : RELAY_PUT),
                                     SPLICE_F_MOVE));
                while (n == -EINTR);
                counted(f);
                if (not_this_way(n)) {
                    f->method = RELAY_COPY;
                    continue;
                }
                if (n > 0)
                    __atomic_fetch_add(&f->moved, n, __ATOMIC_RELAXED);
            } else {
                if (!f->buffer)
                    return -ENOBUFS;
                n = call_read(from, 0, f->buffer, load < f->buffer_size ? load : f->buffer_size);
                counted(f);
                if (n > 0)
                    n = write_whole(f, f->buffer, n);
            }
            if (n == -EAGAIN) {
                wait_for_room(f);
                continue;
            }
            if (n <= 0) {
                n = n ? n : -EIO;
                __atomic_store_n(&f->error, (int)-n, __ATOMIC_RELEASE);
                answer(f);
                return (int)n;
            }
            f->load[f->away] -= n;
        }
        relay_ferry_give_back(f);
    }
}

int64_t relay_lend(int pipe_w, const char *memory, int64_t size) { return call_lend(pipe_w, memory, size); }

int64_t relay_tee(int pipe_r, int pipe_w, int64_t size) { return call_tee(pipe_r, pipe_w, size); }

int64_t relay_splice(int from, int64_t offset, int to, int64_t size, int more)
{
    loff_t at = offset;
    return call_splice(from, offset < 0 ? NULL : &at, to, size, more ? SPLICE_F_MORE : 0);
}

/* Asking a pipe whether it is ready takes no lock of it, trying to move bytes does: whoever spins must not hold up the
 * other end. */
int relay_spin(int fd, int events, int64_t ns)
{
    struct pollfd one = { .fd = fd, .events = (short)events };
    int64_t until = 0, now;
    struct timespec t;

    for (;;) {
        int ready = poll(&one, 1, 0);
        if (ready)
            return ready < 0 ? -errno : 1;
        clock_gettime(CLOCK_MONOTONIC, &t);
        now = t.tv_sec * 1000000000LL + t.tv_nsec;
        if (!until)
            until = now + ns;
        else if (now >= until)
            return 0;
        sched_yield();      /* the other end may be waiting for this very CPU */
    }
}
