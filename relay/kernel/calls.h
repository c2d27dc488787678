/* System calls as the pump uses them: never blocking on a pipe, retried on EINTR, -errno for failure.
 *
 * Facts (man 2 splice, tee, vmsplice; fs/splice.c):
 * - SPLICE_F_NONBLOCK covers the pipe side only; sockets carry O_NONBLOCK themselves.
 * - A length larger than what the pipe holds can make the kernel set MSG_MORE on the last batch of 16
 *   slots, and the rest waits 200 ms: callers pass exactly what is known to be in the pipe.
 * - A length of 0 returns 0, which looks like the end of the stream: callers never pass it.
 * - There is no MSG_NOSIGNAL for splice: the process ignores SIGPIPE. */
#ifndef RELAY_CALLS_H
#define RELAY_CALLS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "pump.h"
#include "duplex.h"

#define RELAY_PIECE (1 << 20)   /* most bytes in one call: the largest pipe an ordinary user gets */

static inline int64_t result(ssize_t n) { return n < 0 ? -(int64_t)errno : (int64_t)n; }

/* What this thread has used of the CPU: a system call. */
static inline int64_t cpu_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (int64_t)now.tv_sec * 1000000000LL + now.tv_nsec;
}

static inline int64_t call_splice(int from, loff_t *offset, int to, int64_t size, unsigned more)
{
    ssize_t n;
    do n = splice(from, offset, to, NULL, (size_t)size, SPLICE_F_NONBLOCK | SPLICE_F_MOVE | more);
    while (n < 0 && errno == EINTR);
    return result(n);
}

static inline int64_t call_tee(int from, int to, int64_t size)
{
    ssize_t n;
    do n = tee(from, to, (size_t)size, SPLICE_F_NONBLOCK);
    while (n < 0 && errno == EINTR);
    return result(n);
}

static inline int64_t call_lend(int pipe_w, const char *memory, int64_t size)
{
    struct iovec piece = { .iov_base = (void *)(uintptr_t)memory, .iov_len = (size_t)size };
    ssize_t n;
    do n = vmsplice(pipe_w, &piece, 1, SPLICE_F_NONBLOCK);
    while (n < 0 && errno == EINTR);
    return result(n);
}

static inline int64_t call_sendfile(int to, int from, loff_t *offset, int64_t size)
{
    ssize_t n;
    do n = sendfile(to, from, offset, (size_t)size);
    while (n < 0 && errno == EINTR);
    return result(n);
}

static inline int64_t call_read(int fd, int is_socket, char *into, int64_t size)
{
    ssize_t n;
    do n = is_socket ? recv(fd, into, (size_t)size, MSG_DONTWAIT) : read(fd, into, (size_t)size);
    while (n < 0 && errno == EINTR);
    return result(n);
}

static inline int64_t call_pread(int fd, char *into, int64_t size, int64_t offset)
{
    ssize_t n;
    do n = pread(fd, into, (size_t)size, offset);
    while (n < 0 && errno == EINTR);
    return result(n);
}

static inline int64_t call_write(int fd, int is_socket, const char *from, int64_t size)
{
    ssize_t n;
    do n = is_socket ? send(fd, from, (size_t)size, MSG_DONTWAIT | MSG_NOSIGNAL) : write(fd, from, (size_t)size);
    while (n < 0 && errno == EINTR);
    return result(n);
}

/* Answers that mean "not this way": another method may still work. EINVAL is what splice says for ends it
 * cannot serve; EPERM and ENOSYS are what sandboxes say. */
static inline int not_this_way(int64_t n)
{
    return n == -EINVAL || n == -ENOSYS || n == -EPERM || n == -EOPNOTSUPP;
}

/* pump.c, for loop.c: sweeps p, appends to out[*count..max), says whether the budget stopped it. */
int relay_pump(struct relay_engine *e, struct relay_pipeline *p, struct relay_event *out, int *count, int max);

/* dial.c: a socket that connects, *connected set if it is so already, or -errno; and the end of one. `from`: a sockaddr
 * that it connects from, though that may be somebody else's; `from_size` 0 for none. */
int dial_connect(const struct relay_dial *dial, const char *from, int from_size, int *connected);
void hang_up(int fd, int reset);

/* duplex.c, for loop.c: what epoll said of a side; every session that is ready has its turn. */
void duplex_note(struct relay_engine *e, struct relay_side *side, uint32_t mask);
void duplex_turn(struct relay_engine *e, struct relay_event *out, int *count, int max);

#endif
