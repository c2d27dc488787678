/* Duplex sessions: two sockets, each end's bytes go to the other, as over one connection.
 *
 * Facts (man 7 epoll, 7 tcp, 7 unix; net/ipv4/tcp.c, net/unix/af_unix.c):
 * - A read from a tcp socket that gives less than was asked for has emptied it, and whatever comes later is a new
 *   edge; except that it stops before urgent data, of which epoll tells as EPOLLPRI, and that the end of a stream
 *   that was there already (EPOLLRDHUP) is read as 0 only after that. A unix read also stops where descriptors were
 *   sent along, of which nothing tells.
 * - A send that took less than it was given has filled the socket, and its room is a new edge.
 * - After a reset a socket still gives what it had received, then the error once, then its end.
 * - A reset sent (SO_LINGER 0) destroys what the peer's kernel has not acknowledged. Unix sockets have no send
 *   queue of their own, and no reset but the one that closing with unread bytes sends.
 *
 * What this means here: a small message costs one recv and one send. Bytes that the other side does not take stay
 * in the buffer, or the pipe, that they came in, and nothing more is read until they are gone, so back-pressure is
 * the kernel's. The end of a stream is passed on when nothing of it waits. When a side breaks, what it had sent is
 * delivered as it would have been over one connection, and then the other side is reset; one that does not take
 * it for GRACE_NS is reset all the same. */
#include "calls.h"

#include <netinet/in.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <termios.h>

#define GRACE_NS 2000000000LL
#define LOOK_NS 50000000LL
#define SHARE (1 << 20)       /* most bytes at once while somebody else waits for his turn */

int64_t relay_duplex_waits(const struct relay_side *s) { return s->until - s->at + s->held; }

static struct relay_duplex *session_of(struct relay_side *side)
{
    return (struct relay_duplex *)(side - side->which);
}

static void tell(struct relay_duplex *d, int what, int error, struct relay_event *out, int *count)
{
    struct relay_event *event = &out[(*count)++];
    event->token = d->token;
    event->what = what;
    event->error = error;
    event->mask = d->slot;
}

void relay_duplex_ready(struct relay_engine *e, struct relay_duplex *d)
{
    struct relay_exchange *x = e->exchange;
    if (d->queued)
        return;
    d->queued = 1;
    d->next = NULL;
    if (x->last)
        x->last->next = d;
    else
        x->first = d;
    x->last = d;
}

/* ---- those that wait for a time ------------------------------------------------------------------ */

static void set_timed(struct relay_engine *e, struct relay_duplex *d, int64_t until)
{
    struct relay_exchange *x = e->exchange;
    d->until_ns = until;
    if (until && !d->timed) {
        if (!x->timed)
            x->look_ns = e->now_ns + LOOK_NS;
        d->timed = 1;
        d->timed_prev = NULL;
        d->timed_next = x->timed;
        if (x->timed)
            x->timed->timed_prev = d;
        x->timed = d;
    } else if (!until && d->timed) {
        d->timed = 0;
        if (d->timed_prev)
            d->timed_prev->timed_next = d->timed_next;
        else
            x->timed = d->timed_next;
        if (d->timed_next)
            d->timed_next->timed_prev = d->timed_prev;
    }
}

/* Bytes that a reset would destroy on their way to that side. */
static int64_t outstanding(const struct relay_side *to)
{
    int queued = 0;
    if (!to->tcp || to->error || ioctl(to->fd, TIOCOUTQ, &queued) < 0)
        return 0;
    return queued;
}

int relay_duplex_outstanding(const struct relay_duplex *d)
{
    return (outstanding(&d->sides[0]) > 0) | (outstanding(&d->sides[1]) > 0) << 1;
}

static int others_wait(const struct relay_engine *e) { return e->exchange->first || e->ready_first; }

static void cut(struct relay_engine *e, struct relay_duplex *d)
{
    if (d->state == RELAY_CUTTING)
        return;
    d->state = RELAY_CUTTING;
    d->seen = -1;
    set_timed(e, d, e->now_ns + GRACE_NS);
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

static int register_side(struct relay_engine *e, int operation, struct relay_side *side)
{
    struct epoll_event registration;
    memset(&registration, 0, sizeof registration);
    registration.events = EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET | (side->asked ? (uint32_t)EPOLLOUT : 0);
    registration.data.ptr = side;
    return epoll_ctl(e->epoll, operation, side->fd, &registration) < 0 ? -errno : 0;
}

/* It took less than it was offered. Who never had to wait for room was not registered for it. */
static void filled(struct relay_engine *e, struct relay_side *to)
{
    to->writable = 0;
    if (!to->asked) {
        to->asked = 1;
        if (register_side(e, EPOLL_CTL_MOD, to) < 0)
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

/* Its connection is broken. What it sent before may still be there to be read: that ends of itself. */
static void broke(struct relay_engine *e, struct relay_duplex *d, struct relay_side *side, int64_t error)
{
    side->error = (int)-error;
    side->writable = 0;
    side->readable = side->hung = 1;
    if (!d->first)
        d->first = (uint8_t)(side->which + 1);
    cut(e, d);
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
    while (to->writable && relay_duplex_waits(from)) {
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
            broke(e, d, to, n);
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
            filled(e, to);
    }
    if (relay_duplex_waits(from))
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
        filled(e, to);
    if (sent == -EAGAIN)
        return n; /* it is still there */
    if (sent < 0) {
        broke(e, d, to, sent);
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

/* From one side to the other, as far as it goes; whether the budget stopped it. */
static int pass(struct relay_engine *e, struct relay_duplex *d, struct relay_side *from, struct relay_side *to)
{
    int64_t left = others_wait(e) ? SHARE : e->budget;
    while (!to->error) {
        int64_t n;
        if (relay_duplex_waits(from) && !flush(e, d, from, to))
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
                broke(e, d, from, n);
            ends(d, from);
        }
    }
    return 0;
}

/* To a broken side nothing can be given: what comes for it is not even read, what waits is gone. */
static void lose(struct relay_exchange *x, struct relay_side *from)
{
    if (from->buffer)
        give_back(x, from);
}

/* ---- a session's turn ---------------------------------------------------------------------------- */

static int over(struct relay_engine *e, struct relay_duplex *d)
{
    d->state = RELAY_ENDED;
    set_timed(e, d, 0);
    return 1;
}

/* Whether nothing is left to be done, after ends were passed on. */
static int settled(struct relay_engine *e, struct relay_duplex *d)
{
    struct relay_side *a = &d->sides[0], *b = &d->sides[1];
    if (d->state == RELAY_TURNING) {
        int a_done = a->ended && !relay_duplex_waits(a), b_done = b->ended && !relay_duplex_waits(b);
        struct relay_side *deaf = a_done ? b : a;
        if (a_done && b_done)
            return over(e, d);
        if ((a_done || b_done) && !deaf->shut) {
            deaf->shut = 1;
            d->last_ns = e->now_ns; /* it wants an answer, too */
            if (shutdown(deaf->fd, SHUT_WR) < 0)
                broke(e, d, deaf, -errno);
        }
        if (a->hung == 2 || b->hung == 2)
            cut(e, d); /* an error that stands behind bytes which nobody takes */
    }
    if (d->state == RELAY_CUTTING) {
        struct relay_side *bad = a->error ? a : b, *good = a->error ? b : a;
        if (a->error && b->error)
            return over(e, d);
        if (bad->error) {
            lose(e->exchange, good);
            if (bad->ended && !relay_duplex_waits(bad) && !outstanding(good))
                return over(e, d);
        }
    }
    return 0;
}

/* What became of a connect: 1, 0 while it goes on, or -errno. */
static int connected(struct relay_side *side)
{
    struct sockaddr_storage here, there;
    socklen_t here_size = sizeof here, there_size = sizeof there, size = sizeof(int);
    int error = 0;
    if (!side->writable)
        return 0;
    if (getsockopt(side->fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0)
        return -errno;
    if (error)
        return -error;
    if (!side->tcp)
        return 1;
    if (getpeername(side->fd, (struct sockaddr *)&there, &there_size) < 0)
        return errno == ENOTCONN ? 0 : -errno;
    /* a port on which nobody listens may be given to the very socket that connects to it */
    if (getsockname(side->fd, (struct sockaddr *)&here, &here_size) == 0 && here_size == there_size
        && !memcmp(&here, &there, here_size))
        return -ECONNREFUSED;
    return 1;
}

static void turn(struct relay_engine *e, struct relay_duplex *d, struct relay_event *out, int *count)
{
    struct relay_side *a = &d->sides[0], *b = &d->sides[1];
    int more;
    e->exchange->turns++;
    if (d->state == RELAY_CONNECTING) {
        int answer = connected(b);
        if (answer < 0) {
            set_timed(e, d, 0);
            d->state = RELAY_UNCONNECTED;
            tell(d, RELAY_NOT_CONNECTED, -answer, out, count);
        }
        if (answer <= 0)
            return;
        set_timed(e, d, 0);
        d->state = RELAY_TURNING;
    }
    if (d->state == RELAY_ENDED || d->state == RELAY_UNCONNECTED)
        return;
    more = pass(e, d, a, b);
    more |= pass(e, d, b, a);
    if (settled(e, d)) {
        tell(d, RELAY_OVER, 0, out, count);
        return;
    }
    /* a side that broke while the other way was turned may have more to give */
    if (more || (a->error && a->readable && b->writable) || (b->error && b->readable && a->writable))
        relay_duplex_ready(e, d);
}

/* Those that connect and those that are cut: a look at each, a few times a second. */
static void look(struct relay_engine *e, struct relay_event *out, int *count, int max)
{
    struct relay_exchange *x = e->exchange;
    struct relay_duplex *d, *next;
    for (d = x->timed; d && max - *count > 4; d = next) {
        next = d->timed_next;
        if (d->state == RELAY_CUTTING) {
            struct relay_side *good = &d->sides[d->sides[0].error || d->sides[0].hung == 2 ? 1 : 0];
            struct relay_side *bad = &d->sides[!good->which];
            int64_t left = outstanding(good) + relay_duplex_waits(bad);
            if (left != d->seen)
                d->until_ns = e->now_ns + GRACE_NS;
            d->seen = left;
            if (e->now_ns >= d->until_ns) {
                if (!bad->error)
                    bad->error = ECONNRESET;
                over(e, d);
                tell(d, RELAY_OVER, 0, out, count);
            } else {
                relay_duplex_ready(e, d);
            }
        } else if (e->now_ns >= d->until_ns) {
            set_timed(e, d, 0);
            d->state = RELAY_UNCONNECTED;
            tell(d, RELAY_NOT_CONNECTED, ETIMEDOUT, out, count);
        }
    }
    x->look_ns = e->now_ns + LOOK_NS;
}

void duplex_note(struct relay_engine *e, struct relay_side *side, uint32_t mask)
{
    struct relay_duplex *d = session_of(side);
    if (mask & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        side->readable = !side->ended;
    if (mask & (EPOLLOUT | EPOLLHUP | EPOLLERR))
        side->writable = !side->error;
    if (mask & EPOLLPRI)
        side->urgent = 1;
    if (mask & (EPOLLRDHUP | EPOLLHUP))
        side->hung = side->hung == 2 ? 2 : 1;
    if (mask & EPOLLERR)
        side->hung = 2;
    if (d->state != RELAY_CONNECTING || (side->which && side->writable))
        relay_duplex_ready(e, d);
}

void duplex_turn(struct relay_engine *e, struct relay_event *out, int *count, int max)
{
    struct relay_exchange *x = e->exchange;
    struct relay_duplex *d, *last;
    if (x->timed && e->now_ns >= x->look_ns)
        look(e, out, count, max);
    last = x->last;
    for (int more = 1; more && x->first && max - *count > 4;) {
        d = x->first;
        more = d != last;
        x->first = d->next;
        if (!x->first)
            x->last = NULL;
        d->next = NULL;
        d->queued = 0;
        turn(e, d, out, count);
    }
    if (x->wants_pipe == 2 && max > *count) {
        struct relay_event *event = &out[(*count)++];
        x->wants_pipe = 0;
        event->token = x->token;
        event->what = RELAY_WANTS_PIPE;
        event->error = 0;
        event->mask = 0;
    }
}

/* ---- its beginning and its end ------------------------------------------------------------------- */

int relay_duplex_begin(struct relay_engine *e, struct relay_duplex *d, int fd, int tcp, int method, int method_back,
                       uint64_t token, uint32_t slot)
{
    memset(d, 0, sizeof *d);
    d->token = token;
    d->slot = slot;
    for (int k = 0; k < 2; k++) {
        struct relay_side *side = &d->sides[k];
        side->kind = RELAY_SIDE;
        side->which = (uint8_t)k;
        side->method = (uint8_t)(k ? method_back : method);
        side->fd = side->pipe_r = side->pipe_w = -1;
    }
    d->sides[0].fd = fd;
    d->sides[0].tcp = (uint8_t)tcp;
    d->sides[0].writable = 1;
    return register_side(e, EPOLL_CTL_ADD, &d->sides[0]);
}

int relay_duplex_dial(struct relay_engine *e, struct relay_duplex *d, const struct relay_dial *dial, int64_t timeout_ns)
{
    struct relay_side *b = &d->sides[1];
    int is_connected, error;
    hang_up(b->fd, 0);
    b->fd = dial_connect(dial, &is_connected);
    if (b->fd < 0) {
        error = b->fd;
        b->fd = -1;
        return error;
    }
    b->tcp = (uint8_t)dial->tcp;
    b->writable = (uint8_t)is_connected;
    b->readable = b->hung = b->urgent = 0;
    b->asked = !is_connected;
    error = register_side(e, EPOLL_CTL_ADD, b);
    if (error)
        return error;
    d->state = is_connected ? RELAY_TURNING : RELAY_CONNECTING;
    if (is_connected)
        relay_duplex_ready(e, d);
    else
        set_timed(e, d, e->now_ns + timeout_ns);
    return 0;
}

void relay_duplex_close(struct relay_engine *e, struct relay_duplex *d, int reset)
{
    struct relay_exchange *x = e->exchange;
    set_timed(e, d, 0);
    if (d->queued) {
        struct relay_duplex *last = NULL;
        for (struct relay_duplex **at = &x->first; *at;) {
            if (*at == d) {
                *at = d->next;
            } else {
                last = *at;
                at = &(*at)->next;
            }
        }
        x->last = last;
        d->queued = 0;
    }
    d->state = RELAY_ENDED;
    for (int k = 0; k < 2; k++) {
        struct relay_side *side = &d->sides[k];
        hang_up(side->fd, reset);
        side->fd = -1;
        if (side->buffer)
            give_back(x, side);
        if (side->pipe_r >= 0 && side->held) {
            close(side->pipe_r);
            close(side->pipe_w);
            side->pipe_r = side->pipe_w = -1;
        } else if (side->pipe_r >= 0) {
            give_pipe_back(x, side);
        }
    }
}
