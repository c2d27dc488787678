/* What the files of the pump share: the state of one sweep, and what each does for the others.
 *
 *     intake.c    into a node: prefixes, and the head from the source
 *     pieces.c    how large the first ones are
 *     outflow.c   out of a node: tee, splice or copy to the next node, a sink, a ferry, or nowhere
 *     loads.c     loads for a ferry's thread: which bytes are in them, and when they are handed over
 *     gate.c      how much may leave a node: rates, slow ways out, gaps
 *     ring.c      memory that many read
 *     scatter.c   the source straight into a ring that all sinks read
 *     pump.c      a node's turn, the sweep over all nodes
 *
 * What the accounting knows, the kernel is never asked: a node holds fed - drained bytes. So
 * - EAGAIN while filling an empty pipe can only mean that the giving side is empty (or a passing fault);
 * - EAGAIN while filling one that holds bytes may mean either: the node is `full` until it is drained,
 *   and then asked once more;
 * - EAGAIN while draining can only mean that the taking side is full.
 * An edge-triggered readiness flag is cleared only by EAGAIN. Should an EAGAIN contradict what poll(2) or
 * the accounting says, the pipeline looks again after RETRY_NS: it neither hangs nor spins. */
#ifndef RELAY_PASS_H
#define RELAY_PASS_H

#include "calls.h"

#include <poll.h>
#include <sys/ioctl.h>
#include <termios.h>

#define RETRY_NS 10000000LL

struct pass {                 /* one sweep's working state */
    struct relay_engine *e;
    struct relay_pipeline *p;
    struct relay_event *out;
    int count, max;
    int64_t read;             /* bytes taken from the source in this sweep */
    int64_t given;            /* bytes given to readers of rings */
    int again;                /* something was put off: sweep once more */
};

static inline void tell(struct pass *s, uint64_t token, int what, int64_t error)
{
    if (s->count < s->max) {
        struct relay_event *event = &s->out[s->count++];
        event->token = token;
        event->what = what;
        event->error = (int32_t)(error < 0 ? -error : error);
        event->mask = 0;
    }
}

static inline void wake_at(struct pass *s, int64_t when)
{
    if (!s->p->wake_ns || when < s->p->wake_ns)
        s->p->wake_ns = when;
}

static inline void look_again(struct pass *s)
{
    s->p->retry = 1;
    wake_at(s, s->e->now_ns + RETRY_NS);
}

static inline int says_ready(int fd, short events)
{
    struct pollfd one = { .fd = fd, .events = events };
    return poll(&one, 1, 0) > 0;
}

static inline void sink_failed(struct pass *s, struct relay_node *n, int64_t error)
{
    struct relay_end *sink = n->sink;
    sink->failed = 1;
    sink->readable = sink->writable = 0;
    if (!n->hold) {
        n->sink = NULL;
        n->since_ns = 0;
    }
    tell(s, sink->token, RELAY_SINK_FAILED, error);
}

/* How far the peer's kernel has everything, noted right after bytes were given to it: whoever reads the note
 * later, even after SIGKILL, finds a position that was passed, at most one send queue behind. */
static inline void note_acknowledged(struct relay_end *sink)
{
    int waiting = 0;
    if (!sink->acknowledged)
        return;
    if (sink->queues && ioctl(sink->fd, TIOCOUTQ, &waiting) < 0)
        return;
    __atomic_store_n(sink->acknowledged, sink->base + sink->moved - waiting, __ATOMIC_RELAXED);
}

/* Whoever writes or reads the other end of a pipe holds it locked while it copies, and a call on it spins that long on
 * another CPU: it took half of all that moving between pipes cost. poll(2) takes no lock. So a pipe that was just
 * emptied or filled is not asked again: the edge comes when the other side is through. What poll calls empty or full at
 * this moment changes with an edge only. */
static inline void leave_alone(struct relay_end *end, int *ready, short events)
{
    if (end->is_pipe && end->fd >= 0 && !says_ready(end->fd, events))
        *ready = 0;
}

#define RELAY_SMALL (64 << 10)  /* bytes: what fills no pipe */

/* Bytes were given to a sink. The event may wait for a sweep with room: it is told for as long as nobody heard. */
static inline void sink_took(struct pass *s, struct relay_end *sink, int64_t moved)
{
    sink->moved += moved;
    sink->last_ns = s->e->now_ns;
    note_acknowledged(sink);
    if (moved >= RELAY_SMALL)
        leave_alone(sink, &sink->writable, POLLOUT);
    if (sink->rouse && s->count < s->max) {
        sink->rouse = 0;
        tell(s, sink->token, RELAY_SINK_BUSY, 0);
    }
}

#define BRIEFLY (RELAY_PIECE / 2)

/* Bytes of one read, and of one sweep, at the most. */
static inline int64_t most_read(const struct relay_pipeline *p) { return p->brief ? BRIEFLY : RELAY_PIECE; }
static inline int64_t most_swept(const struct pass *s) { return s->p->brief ? BRIEFLY : s->e->budget; }

static inline int refuses(const struct relay_node *n) { return n->full || n->prefix_left; }

/* Whether an own pipe gave or took nothing, though it was there to: it is asked again, or it is broken. */
static inline int nothing_moved(struct pass *s, const struct relay_node *n, int64_t moved)
{
    if (moved == -EAGAIN)
        look_again(s);
    else if (moved <= 0)
        tell(s, n->token, RELAY_BROKEN, moved ? moved : EIO);
    return moved <= 0;
}

/* What a failed attempt to fill a node means, from where nothing came (see the top of this file). */
static inline void not_filled(struct pass *s, struct relay_node *n)
{
    if (n->held > n->stash_len - n->stash_out)
        n->full = 1;
    else
        look_again(s);
}

/* Whether anything is still in this node's keeping. */
static inline int holds(const struct relay_node *n)
{
    return n->held || n->prefix_left || n->rest_have || (n->next && n->stash_next < n->stash_len);
}

static inline int ferry_has(struct relay_ferry *f, int k)
{
    return __atomic_load_n(&f->turn[k], __ATOMIC_ACQUIRE) == RELAY_WITH_ENGINE;
}

/* Whether the thread has nothing that it did not write yet, nor will get it. */
static inline int ferry_is_empty(struct relay_ferry *f)
{
    return ferry_has(f, 0) && ferry_has(f, 1) && !f->load[0] && !f->load[1];
}

/* Whether a thread has a part of the ring that this reader reads. */
static inline int has_spans(const struct relay_reader *r) { return r->ends[0] || r->ends[1]; }

/* From where on memory is to be kept for a reader, and what it did not take yet. */
static inline int64_t needs_from(const struct relay_reader *r) { return has_spans(r) ? r->kept : r->at; }

/* Where in a ring's memory a position lies. */
static inline int64_t place(const struct relay_ring *ring, int64_t at) { return (at - ring->base) % ring->size; }

/* intake.c: whether anything moved; read_source: bytes, 0 when none came. */
int fill_prefix(struct pass *s, struct relay_node *n);
int fill_from_source(struct pass *s);
int source_gives(struct pass *s);
int64_t read_source(struct pass *s, char *to, int64_t most);
int source_took(struct pass *s, int64_t moved);

/* pieces.c */
void look_at_piece(struct pass *s, const struct relay_node *head, int64_t filled);

/* gate.c */
int64_t gate(struct pass *s, struct relay_node *n, int64_t amount);
void blocked(struct pass *s, struct relay_node *n);
void into_emptied(struct pass *s, struct relay_node *n);
int drop(struct pass *s, struct relay_node *n, int64_t amount);
int64_t border(const struct relay_turns *turns, int64_t align, int64_t at, int down);
void turn_begins(struct relay_turns *turns, int64_t at);

/* outflow.c */
void drained(struct pass *s, struct relay_node *n, int64_t moved);
int discard(struct pass *s, struct relay_node *n, int64_t amount);
int fill_stash(struct pass *s, struct relay_node *n, int fresh);
int tee_by_hand(struct pass *s, struct relay_node *n);
int tee_on(struct pass *s, struct relay_node *n);
int move_out(struct pass *s, struct relay_node *n, int64_t amount);
int64_t throw_away(struct pass *s, struct relay_node *n, int64_t amount);
int64_t give(struct relay_node *n, int to, int is_socket, int64_t amount);

/* loads.c */
int64_t give_to_ferry(struct pass *s, struct relay_node *n, int64_t amount);
int goes_straight(const struct relay_node *head);
int fill_ferry(struct pass *s, struct relay_node *head);
void ferry_flush(struct pass *s, struct relay_ferry *f);
void pace_source(struct pass *s);
void take_back_spans(struct relay_reader *r);
int64_t give_span(struct pass *s, const struct relay_ring *ring, struct relay_reader *r);
int64_t gauged_by_threads(const struct relay_pipeline *p);
void ask_for_spans(struct pass *s, const struct relay_ring *ring, struct relay_reader *r);

/* ring.c */
int64_t ring_take(struct pass *s, struct relay_node *n, int64_t amount);
int ring_give(struct pass *s, struct relay_ring *ring);
int ring_gave_enough(const struct pass *s);
void ring_hear(struct pass *s, struct relay_ring *ring);
void ring_retry(struct relay_ring *ring);
int64_t ring_room(struct pass *s, struct relay_ring *ring, int64_t wanted);
int ring_is_empty(const struct relay_ring *ring);
void ring_came(struct pass *s, struct relay_ring *ring, int64_t moved);

/* scatter.c */
int scatter(struct pass *s);
int scatter_settle(struct pass *s, int *empty, int *calm);

/* pump.c: 0, or why the end failed */
int64_t read_and_discard(struct pass *s, struct relay_end *sink);

#endif
