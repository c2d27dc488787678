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
#include "direction.h"

#include <netinet/in.h>
#include <string.h>
#include <sys/epoll.h>

#define GRACE_NS 2000000000LL
#define LOOK_NS 50000000LL
#define STILL_NS 1000000000LL

int64_t relay_duplex_waits(const struct relay_side *s) { return waits(s); }

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

int relay_duplex_outstanding(const struct relay_duplex *d)
{
    return (side_outstanding(&d->sides[0]) > 0) | (side_outstanding(&d->sides[1]) > 0) << 1;
}

void duplex_cut(struct relay_engine *e, struct relay_duplex *d)
{
    if (d->state == RELAY_CUTTING)
        return;
    d->state = RELAY_CUTTING;
    d->seen = -1;
    set_timed(e, d, e->now_ns + GRACE_NS);
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
        int a_done = a->ended && !waits(a), b_done = b->ended && !waits(b);
        struct relay_side *deaf = a_done ? b : a;
        if (a_done && b_done)
            return over(e, d);
        if ((a_done || b_done) && !deaf->shut) {
            deaf->shut = 1;
            d->last_ns = e->now_ns; /* it wants an answer, too */
            if (shutdown(deaf->fd, SHUT_WR) < 0)
                side_broke(e, d, deaf, -errno);
        }
        if (a->hung == 2 || b->hung == 2)
            duplex_cut(e, d); /* an error that stands behind bytes which nobody takes */
    }
    if (d->state == RELAY_CUTTING) {
        struct relay_side *bad = a->error ? a : b, *good = a->error ? b : a;
        if (a->error && b->error)
            return over(e, d);
        if (bad->error) {
            side_lose(e->exchange, good);
            if (bad->ended && !waits(bad) && !side_outstanding(good))
                return over(e, d);
        }
    }
    return 0;
}

/* What became of a connect: 1, 0 while it goes on, or -errno. Of a failure epoll tells beside EPOLLOUT. */
static int connected(struct relay_side *side)
{
    struct sockaddr_storage here, there;
    socklen_t here_size = sizeof here, there_size = sizeof there, size = sizeof(int);
    int error = 0;
    if (!side->writable)
        return 0;
    if (side->hung && getsockopt(side->fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0)
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

/* What goes ahead of everything to the second side. Whether it has gone, or never will. */
static int gone_ahead(struct relay_engine *e, struct relay_duplex *d)
{
    struct relay_side *b = &d->sides[1];
    while (d->ahead_at < d->ahead_size && b->writable) {
        int64_t left = d->ahead_size - d->ahead_at, n = call_write(b->fd, 1, d->ahead + d->ahead_at, left);
        e->calls++;
        if (n < 0 && n != -EAGAIN) {
            side_broke(e, d, b, n);
            break;
        }
        if (n > 0)
            d->ahead_at += (int32_t)n;
        if (n == -EAGAIN)
            side_filled(e, b);
    }
    return d->ahead_at == d->ahead_size || b->error;
}

/* Whether a direction is the one that is measured. */
static int at_gauge(const struct relay_engine *e, const struct relay_duplex *d, struct relay_side *from)
{
    struct relay_gauge *g = &e->exchange->gauge;
    if (g->side == from)
        return 1;
    if (!d->gauges || !from->bulk || (g->side && e->now_ns - g->last_ns < STILL_NS))
        return 0;
    if (g->side)
        g->side->method = (uint8_t)g->method;
    g->side = from;
    g->method = from->method;
    g->skip = g->first_skip;
    g->size = g->first_size;
    g->came = g->gauged = g->cpu_ns = 0;
    g->last_ns = e->now_ns;
    return 1;
}

/* One direction's turn. */
static int pass(struct relay_engine *e, struct relay_duplex *d, struct relay_side *from, struct relay_side *to,
                struct relay_event *out, int *count)
{
    struct relay_gauge *g = &e->exchange->gauge;
    int64_t began, moved = from->moved;
    int more;
    if (!at_gauge(e, d, from))
        return direction_pass(e, d, from, to);
    began = g->skip > 0 ? 0 : cpu_ns();
    more = direction_pass(e, d, from, to);
    moved = from->moved - moved;
    g->came += moved;
    if (moved)
        g->last_ns = e->now_ns;
    if (g->skip > 0) {
        g->skip -= moved;
        return more;
    }
    g->cpu_ns += cpu_ns() - began;
    g->gauged += moved;
    if (g->gauged >= g->size) {
        g->size = INT64_MAX;
        tell(d, RELAY_GAUGED, from->which, out, count);
    }
    return more;
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
        d->connected_ns = e->now_ns;
    }
    if (d->state == RELAY_TURNING && d->lends) {
        epoll_ctl(e->epoll, EPOLL_CTL_DEL, a->fd, NULL);
        epoll_ctl(e->epoll, EPOLL_CTL_DEL, b->fd, NULL);
        d->state = RELAY_LENT;
        tell(d, RELAY_CONNECTED, 0, out, count);
    }
    if (d->state == RELAY_ENDED || d->state == RELAY_UNCONNECTED || d->state == RELAY_LENT)
        return;
    if (d->ahead_at < d->ahead_size && !gone_ahead(e, d))
        return;
    more = pass(e, d, a, b, out, count);
    more |= pass(e, d, b, a, out, count);
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
            int64_t left = side_outstanding(good) + waits(bad);
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
    return side_register(e, EPOLL_CTL_ADD, &d->sides[0]);
}

int relay_duplex_adopt(struct relay_engine *e, struct relay_duplex *d, int fd, int tcp, int is_connected,
                       int64_t timeout_ns)
{
    struct relay_side *b = &d->sides[1];
    int error;
    b->fd = fd;
    b->tcp = (uint8_t)tcp;
    b->writable = (uint8_t)is_connected;
    b->readable = b->hung = b->urgent = 0;
    b->asked = !is_connected;
    error = side_register(e, EPOLL_CTL_ADD, b);
    if (error)
        return error;
    d->state = is_connected ? RELAY_TURNING : RELAY_CONNECTING;
    if (is_connected)
        d->connected_ns = e->now_ns;
    if (is_connected)
        relay_duplex_ready(e, d);
    else
        set_timed(e, d, e->now_ns + timeout_ns);
    return 0;
}

int relay_duplex_dial(struct relay_engine *e, struct relay_duplex *d, const struct relay_dial *dial, int64_t timeout_ns)
{
    struct relay_side *b = &d->sides[1];
    int is_connected, fd;
    hang_up(b->fd, 0);
    b->fd = -1;
    d->ahead_at = 0;
    fd = dial_connect(dial, d->origin, d->origin_size, &is_connected);
    return fd < 0 ? fd : relay_duplex_adopt(e, d, fd, dial->tcp, is_connected, timeout_ns);
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
        if (x->gauge.side == side)
            x->gauge.side = NULL;
        side_release(e, side);
    }
}
