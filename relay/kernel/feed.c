/* The two loops behind `relay bench`. See feed.h.
 *
 * Facts: a write to a pipe copies into fresh pages, which bounds a pipe at the speed of memory; a splice from
 * the page cache fills it with references, several times faster. Socket hops cost more than the copy, so
 * there a plain send, which is what producers do, is fast enough. Below a page a splice would make
 * one pipe slot of each piece, where writes are merged into pages. */
#include "calls.h"
#include "feed.h"

#include <poll.h>

int relay_feed_run(struct relay_feed *f)
{
    loff_t at = 0;
    while (!__atomic_load_n(&f->stop, __ATOMIC_ACQUIRE)) {
        int64_t done = 0;
        while (done < f->size) {
            int64_t n;
            if (f->memory) {
                n = result(write(f->fd, f->memory + done, (size_t)(f->size - done)));
            } else {
                if (at + f->size > f->file_size)
                    at = 0;
                n = result(splice(f->file, &at, f->fd, NULL, (size_t)(f->size - done), 0));
            }
            if (n == -EINTR)
                continue;
            if (n <= 0)
                return n ? (int)n : -EIO;
            done += n;
            __atomic_fetch_add(&f->moved, n, __ATOMIC_RELAXED);
        }
    }
    return 0;
}

/* What is there now: its bytes, 0 at the end of the stream, -errno. */
static int64_t take(struct relay_drain *d, int i)
{
    switch (d->kinds[i]) {
    case RELAY_DRAIN_PIPE:
        return call_splice(d->fds[i], NULL, d->null_fd, RELAY_PIECE, 0);
    case RELAY_DRAIN_TCP:
        return result(recv(d->fds[i], NULL, RELAY_PIECE, MSG_DONTWAIT | MSG_TRUNC));
    default:
        return call_read(d->fds[i], 1, d->memory, d->memory_size);
    }
}

int relay_drain_run(struct relay_drain *d)
{
    struct pollfd polls[65];
    int open = d->count, first = 0;
    if (d->count > 64)
        return -EINVAL;
    for (int i = 0; i < d->count; i++)
        polls[i] = (struct pollfd){ .fd = d->fds[i], .events = POLLIN };
    polls[d->count] = (struct pollfd){ .fd = d->stop, .events = POLLIN };
    while (open) {
        if (poll(polls, (nfds_t)d->count + 1, -1) < 0 && errno != EINTR)
            return -errno;
        if (polls[d->count].revents)
            break;
        for (int i = 0; i < d->count; i++) {
            int64_t n;
            if (polls[i].fd < 0 || !polls[i].revents)
                continue;
            n = take(d, i);
            if (n == -EAGAIN || n == -EINTR)
                continue;
            if (n > 0) {
                d->got[i] += n;
                continue;
            }
            if (!n && d->kinds[i] != RELAY_DRAIN_PIPE)
                shutdown(d->fds[i], SHUT_WR);   /* as a receiver does that has it all: nobody waits for it */
            first = first ? first : (int)n;
            polls[i].fd = -1;
            open--;
        }
    }
    return first;
}
