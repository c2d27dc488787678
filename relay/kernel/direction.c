/* One direction of a duplex session: what one side gave, on its way to the other one (duplex.c has the facts and
 * the theory). */
#include "direction.h"

#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <termios.h>

#define SHARE (1 << 20)       /* most bytes at once while somebody else waits for his turn */

static int others_wait(const struct relay_engine *e) { return e->exchange->first || e->ready_first; }

int64_t side_outstanding(const struct relay_side *to)
{
    int queued = 0;
    if (!to->tcp || to->error || ioctl(to->fd, TIOCOUTQ, &queued) < 0)
        return 0;
    return queued;
}

/* ---- memory and pipes ---------------------------------------------------------------------------- */

static char *borrow(struct relay_exchange *x, struct relay_side *s, int large)
{
    if (large && x->large_count) {
        s->large = 1;
        return s->buffer = x->large + (int64_t)x->large_free[--x->large_count] * x->large_size;
    }
    if (!x->small_count)
        return NULL;
    s->large = 0;
    return s->buffer = x->small + (int64_t)x->small_free[--x->small_count] * x->small_size;
}

static void give_back(struct relay_exchange *x, struct relay_side *s)
{
    if (s->large)
        x->large_free[x->large_count++] = (int32_t)((s->buffer - x->large) / x->large_size);
    else
        x->small_free[x->small_count++] = (int32_t)((s->buffer - x->small) / x->small_size);
    s->buffer = NULL;
    s->at = s->until = 0;
}

static int borrow_pipe(struct relay_exchange *x, struct relay_side *s)
{
    if (s->pipe_r >= 0)
        return 1;
    if (!x->pipe_count) {
        if (x->wants_pipe == 1)
            x->wants_pipe = 2;
        return 0;
    }
    x->pipe_count--;
    s->pipe_r = x->pipes_r[x->pipe_count];
    s->pipe_w = x->pipes_w[x->pipe_count];
    return 1;
}

static void give_pipe_back(struct relay_exchange *x, struct relay_side *s)
{
    x->pipes_r[x->pipe_count] = s->pipe_r;
    x->pipes_w[x->pipe_count] = s->pipe_w;
    x->pipe_count++;
    s->pipe_r = s->pipe_w = -1;
}

/* ---- one way ------------------------------------------------------------------------------------- */

int side_register(struct relay_engine *e, int operation, struct relay_side *side)
{
    struct epoll_event registration;
    memset(&registration, 0, sizeof registration);
    registration.events = EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET | (side->asked ? (uint32_t)EPOLLOUT : 0);
    registration.data.ptr = side;
    return epoll_ctl(e->epoll, operation, side->fd, &registration) < 0 ? -errno : 0;
}

/* Who never had to wait for room was not registered for it. */
void side_filled(struct relay_engine *e, struct relay_side *to)
{
    to->writable = 0;
    if (!to->asked) {
        to->asked = 1;
        if (side_register(e, EPOLL_CTL_MOD, to) < 0)
            to->writable = 1; /* no memory for it: tried again at every turn */
    }
}

static void ends(struct relay_duplex *d, struct relay_side *side)
{
    side->ended = 1;
    side->readable = 0;
    if (!d->first)
        d->first = (uint8_t)(side->which + 1);
}

void side_broke(struct relay_engine *e, struct relay_duplex *d, struct relay_side *side, int64_t error)
{
    side->error = (int)-error;
    side->writable = 0;
    side->readable = side->hung = 1;
    if (!d->first)
        d->first = (uint8_t)(side->which + 1);
    duplex_cut(e, d);
}

static void gave(struct relay_engine *e, struct relay_duplex *d, struct relay_side *from, int64_t bytes)
{
    from->given += bytes;
    d->last_ns = e->now_ns;
}

/* What waits in the pipe moves into a buffer: the kernel refuses to splice it out. Whether there was one. */
static int out_of_pipe(struct relay_exchange *x, struct relay_side *from)
{
    int64_t n;
    if (!borrow(x, from, 1))
        return 0;
    n = call_read(from->pipe_r, 0, from->buffer, from->large ? x->large_size : x->small_size);
    if (n <= 0) {
        give_back(x, from);
        return 0;
    }
    from->until = (int32_t)n;
    from->held -= (int32_t)n;
    return 1;
}

/* What waits goes out first. Whether nothing is left of it. */
static int flush(struct relay_engine *e, struct relay_duplex *d, struct relay_side *from, struct relay_side *to)
{
    struct relay_exchange *x = e->exchange;
    int64_t n;
    while (to->writable && waits(from)) {
        int copies = from->at < from->until;
        int64_t size = copies ? from->until - from->at : from->held;
        e->calls++;
        if (copies)
            n = call_write(to->fd, 1, from->buffer + from->at, size);
        else
            n = call_splice(from->pipe_r, NULL, to->fd, size, 0);
        if (!copies && not_this_way(n)) {
            from->method = RELAY_COPY;
            if (!out_of_pipe(x, from))
                break; /* memory will be there at another turn */
            continue;
        }
        if (n < 0 && n != -EAGAIN) {
            side_broke(e, d, to, n);
            return 0;
        }
        if (n > 0) {
            gave(e, d, from, n);
            if (copies) {
                from->at += (int32_t)n;
            } else {
                from->held -= (int32_t)n;
                from->spliced += n;
            }
        }
        if (copies && from->at == from->until)
            give_back(x, from);
        if (n == -EAGAIN || (copies && n < size))
            side_filled(e, to);
    }
    if (waits(from))
        return 0;
    if (from->pipe_r >= 0)
        give_pipe_back(x, from);
    return 1;
}

/* No memory is free: what is there is looked at, and taken by as much as the other side took. */
static int64_t peek(struct relay_engine *e, struct relay_duplex *d, struct relay_side *from, struct relay_side *to)
{
    int64_t n, sent, rest;
    do n = result(recv(from->fd, e->scratch, (size_t)e->exchange->small_size, MSG_PEEK | MSG_DONTWAIT));
    while (n == -EINTR);
    if (n <= 0)
        return n;
    sent = call_write(to->fd, 1, e->scratch, n);
    if (sent < n)
        side_filled(e, to);
    if (sent == -EAGAIN)
        return n; /* it is still there */
    if (sent < 0) {
        side_broke(e, d, to, sent);
        return n;
    }
    for (rest = sent; rest > 0;) {
        int64_t taken = call_read(from->fd, 1, e->scratch, rest);
        if (taken <= 0)
            break; /* cannot be: it was just seen there */
        rest -= taken;
    }
    from->moved += sent;
    gave(e, d, from, sent);
    return n;
}

/* Reads once and sends what came: bytes read, 0 at the end of the stream, -errno. */
static int64_t take(struct relay_engine *e, struct relay_duplex *d, struct relay_side *from, struct relay_side *to)
{
    struct relay_exchange *x = e->exchange;
    int64_t n, size;
    e->calls++;
    if (from->bulk && from->method == RELAY_SPLICE && borrow_pipe(x, from)) {
        n = call_splice(from->fd, NULL, from->pipe_w, RELAY_PIECE, 0);
        if (n > 0) {
            from->held = (int32_t)n;
            from->moved += n;
            from->bulk = n >= x->small_size;
            return n;
        }
        give_pipe_back(x, from);
        if (!not_this_way(n))
            return n;
        from->method = RELAY_COPY;
    }
    if (!borrow(x, from, from->bulk))
        return peek(e, d, from, to);
    size = from->large ? x->large_size : x->small_size;
    if (size > SHARE && others_wait(e))
        size = SHARE;
    n = call_read(from->fd, 1, from->buffer, size);
    if (n <= 0) {
        give_back(x, from);
        return n;
    }
    from->moved += n;
    from->at = 0;
    from->until = (int32_t)n;
    from->bulk = n >= x->small_size;
    if (n < size && from->tcp && !from->hung && !from->urgent)
        from->readable = 0;
    return n;
}

int direction_pass(struct relay_engine *e, struct relay_duplex *d, struct relay_side *from, struct relay_side *to)
{
    int64_t left = others_wait(e) ? SHARE : e->budget;
    while (!to->error) {
        int64_t n;
        if (waits(from) && !flush(e, d, from, to))
            return 0;
        if (from->ended || !from->readable || !to->writable)
            return 0;
        if (left <= 0)
            return 1;
        n = take(e, d, from, to);
        if (n > 0) {
            left -= n;
        } else if (n == -EAGAIN) {
            from->readable = 0;
        } else {
            if (n < 0 && !from->error)
                side_broke(e, d, from, n);
            ends(d, from);
        }
    }
    return 0;
}

void side_lose(struct relay_exchange *x, struct relay_side *from)
{
    if (from->buffer)
        give_back(x, from);
}

/* Bytes that nobody is to have any more leave the pipe. Whether it is empty. */
static int emptied(struct relay_engine *e, struct relay_side *s)
{
    while (s->held > 0) {
        int64_t n = call_splice(s->pipe_r, NULL, e->null_fd, s->held, 0);
        e->calls++;
        if (not_this_way(n))
            n = call_read(s->pipe_r, 0, e->scratch, e->scratch_size);
        if (n <= 0)
            return 0;
        s->held -= (int32_t)n;
    }
    return 1;
}

void side_release(struct relay_engine *e, struct relay_side *side)
{
    struct relay_exchange *x = e->exchange;
    if (side->buffer)
        give_back(x, side);
    if (side->pipe_r >= 0 && emptied(e, side))
        give_pipe_back(x, side);
    side->pipe_r = side->pipe_w = -1;
}
