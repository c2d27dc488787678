/* Scatter: the source read straight into a ring of memory, and sent out of it once a sink. No pipe is on the way.
 *
 * Facts (net/ipv4/tcp.c; measured, see docs/benchmarks.md):
 * - A send costs a wake-up of whoever receives, a read one of whoever sends: fewer and larger ones cost less.
 * - What is read and sent on at once is still in the cache, if it lies where the last bytes lay.
 * - epoll tells of the next bytes as soon as one is there, which in a rush is always too early.
 *
 * So while a stream is a rush (so many bytes in hold_ns, for so long) nothing less than a batch is given out, but
 * for what was held back for hold_ns. Whether more is coming cannot be known: a request that its sender wants an
 * answer to may look like the middle of a rush. Where holding back was in vain the stream must be a rush for twice
 * as long before it is tried again, so the cost of that mistake vanishes. And a ring that is empty begins anew at
 * its first byte, as long as nothing before is to be kept.
 *
 * A reader is a place of the pipeline's: what is said of a node's sink in pump.h (hold, apart_ns, slow, dropping)
 * holds for it. A sink behind a thread (RELAY_FERRY) is handed spans of the ring, two at a time (loads.c); what a
 * thread has is not written over, whatever became of its sink. */
#include "pass.h"

#define PATIENT (256LL << 20)   /* most bytes that a rush must have lasted for */

static void offer(struct relay_ring *ring)
{
    ring->offered = ring->position;
    ring->held_ns = 0;
}

/* How fast the stream has been until now. */
static void look_at_rush(struct pass *s, struct relay_ring *ring)
{
    int64_t passed = s->e->now_ns - ring->window_ns;
    if (passed < ring->hold_ns)
        return;
    if ((double)ring->window * (double)ring->hold_ns < (double)ring->quick * (double)passed)
        ring->rush = 0;
    ring->window_ns = s->e->now_ns;
    ring->window = 0;
}

/* Gives out what has come, or holds it back while a batch is coming. */
static void offer_or_hold(struct pass *s, struct relay_ring *ring)
{
    struct relay_pipeline *p = s->p;
    int64_t waiting = ring->position - ring->offered;
    if (!waiting)
        return;
    if (!ring->batch || waiting >= ring->batch || ring->rush < ring->need || !p->source || p->source_ended
        || p->paused || p->still || p->head->ended) {
        offer(ring);
        if (ring->rush >= 4 * ring->need && ring->need > ring->least) {
            ring->need /= 2;
            ring->rush = ring->need;
        }
        return;
    }
    if (!ring->held_ns)
        ring->held_ns = s->e->now_ns;
    if (s->e->now_ns - ring->held_ns >= ring->hold_ns) {
        offer(ring);
        ring->rush = 0;
        if (ring->need < PATIENT)
            ring->need *= 2;
    }
}

static int fill_ring(struct pass *s, struct relay_ring *ring)
{
    struct relay_pipeline *p = s->p;
    int gives = source_gives(s);
    int64_t moved;

    if (gives <= 0)
        return gives < 0;
    moved = ring_room(s, ring, most_read(p));
    if (!moved) {
        offer(ring);            /* who is waited for may be a reader of what is held back */
        return 0;
    }
    moved = read_source(s, ring->memory + place(ring, ring->position), moved);
    if (!moved)
        return p->source_ended;
    look_at_rush(s, ring);
    ring->window += moved;
    ring->rush += moved;
    ring_came(s, ring, moved);
    return source_took(s, moved);
}

/* One round: from the source into the ring, out of the ring to the sinks. Whether anything moved. */
int scatter(struct pass *s)
{
    struct relay_ring *ring = s->p->ring;
    int moved;
    if (ring->base < ring->position && !ring->keep && ring_is_empty(ring))
        ring->base = ring->oldest = ring->position;
    moved = fill_ring(s, ring);
    offer_or_hold(s, ring);
    if (s->p->head->ended && !ring->ended) {
        offer(ring);
        ring->ended = 1;
        moved = 1;
    }
    return moved | ring_give(s, ring);
}

/* What of a reader's backlog a turn's end waits for: see in_turn of pump.c. */
static int in_turn(struct pass *s, struct relay_ring *ring, struct relay_reader *r)
{
    int64_t until;
    if (!r->sink || (!r->rest_left && !has_spans(r) && (r->dropping || r->at >= ring->position)))
        return 0;
    if (!r->apart_ns || !s->p->tell_idle)
        return 1;
    if (r->sink->failed)
        return 0;
    if (!s->p->idle_ns)
        s->p->idle_ns = s->e->now_ns;
    until = (r->sink->last_ns ? r->sink->last_ns : s->p->idle_ns) + r->apart_ns;
    if (s->e->now_ns >= until)
        return 0;
    wake_at(s, until);
    return 1;
}

/* After the last round: how many sinks have not had their end; clears `empty` when a turn's end must wait, `calm`
 * when anything at all is under way. */
int scatter_settle(struct pass *s, int *empty, int *calm)
{
    struct relay_ring *ring = s->p->ring;
    int open = 0;
    ring_hear(s, ring);
    if (ring->held_ns)
        wake_at(s, ring->held_ns + ring->hold_ns);
    for (struct relay_reader *r = ring->readers; r; r = r->after) {
        if (r->ferry)
            ask_for_spans(s, ring, r);
        if (in_turn(s, ring, r))
            *empty = 0;
        if (r->rest_left || r->dropping || has_spans(r) || r->at < ring->position)
            *calm = 0;
        if (r->sink && !r->sink->failed && !r->done)
            open++;
    }
    return open;
}
