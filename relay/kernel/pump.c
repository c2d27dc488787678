/* The pump: one sweep moves all that can move through one pipeline, head to tail. See pass.h.
 *
 * Facts (man 3 clock_gettime): a thread's CPU clock stands still while it waits, and goes on in system calls, so
 * what a sweep takes of it is what moving those bytes cost, the kernel's part included. It is read by a system
 * call of its own, so only while a pipeline is measured. */
#include "pass.h"

#define LITTLE (16 << 10)       /* bytes a sweep, of which clocks are a good part of what they take */
#define SPARED 8                /* of so many of them one is measured */

static void pass_end_on(struct pass *s, struct relay_node *n)
{
    n->done = 1;
    if (n->next)
        n->next->ended = 1;
    if (n->into)
        n->into->ended = 1;
    if (n->ring)
        n->ring->ended = 1;
    if (n->sink)
        tell(s, n->sink->token, RELAY_SINK_DRAINED, 0);
}

static int turn_of(struct pass *s, struct relay_node *n)
{
    int moved = 0;
    int64_t amount;

    if (n->since_ns && n->into && !n->into->held && !n->dropping)
        into_emptied(s, n);
    if (n->rest_have && !n->dropping) {         /* the gap was called off: nobody wants its first piece */
        n->passed -= n->rest_have;
        n->dropped += n->rest_have;
        n->rest_have = n->rest_need = 0;
    }
    if (n->prefix_left)
        moved |= fill_prefix(s, n);
    if (!n->held) {
        if (n->next && n->stash_next < n->stash_len)
            moved |= tee_by_hand(s, n);
        if (n->ended)
            n->rest_need = n->rest_have;        /* the piece will not be finished any more */
        if (n->dropping && n->rest_have == n->rest_need)
            moved |= drop(s, n, 0);
        if (n->ended && !holds(n) && !n->done) {
            pass_end_on(s, n);
            moved = 1;
        }
        return moved;
    }
    if (n->next) {
        if (n->stash_next < n->stash_len)
            moved |= tee_by_hand(s, n);
        if (!n->owed) {
            moved |= tee_on(s, n);
            if (n->stash_next < n->stash_len)
                moved |= tee_by_hand(s, n);
        }
        amount = n->owed;
    } else {
        amount = n->held;
    }
    if (!amount)
        return moved;
    if (n->out_copies) {
        if (!n->stash)
            return moved;
        if (n->stash_out == n->stash_len) {
            if (n->stash_next < n->stash_len)
                return moved;
            if (!fill_stash(s, n, 0))
                return moved;
        }
    }
    if (n->stash_len > n->stash_out && amount > n->stash_len - n->stash_out)
        amount = n->stash_len - n->stash_out;
    return moved | move_out(s, n, amount);
}

/* A node's turn. What is teed onwards ends when all was teed, however long the branch takes over its own part. */
static int turn(struct pass *s, struct relay_node *n)
{
    int moved = turn_of(s, n);
    if (n->ended && n->next && !n->next->ended && n->held == n->owed && !n->prefix_left
        && n->stash_next == n->stash_len) {
        n->next->ended = 1;
        moved = 1;
    }
    return moved;
}

/* What the peer of a one-way sink sends is thrown away: closing with unread bytes would reset the connection
 * and destroy what is under way to it. */
int64_t read_and_discard(struct pass *s, struct relay_end *sink)
{
    for (int rounds = 0; rounds < 16 && sink->readable; rounds++) {
        int64_t got = call_read(sink->fd, sink->is_socket, s->e->scratch, s->e->scratch_size);
        if (got > 0) {
            sink->discarded += got;
        } else if (got == -EAGAIN) {
            sink->readable = 0;
        } else if (got == 0) {
            sink->readable = 0;
            /* a unix peer that had ended its own stream may now be gone: no other edge will tell */
            if (!sink->peer_ended || (sink->peer_ended == 1 && says_ready(sink->fd, 0))) {
                sink->peer_ended++;
                tell(s, sink->token, RELAY_PEER_ENDED, 0);
            }
        } else {
            sink->readable = 0;
            return got;
        }
    }
    if (sink->readable)
        look_again(s);
    return 0;
}

/* ---- the whole chain ---------------------------------------------------------------------------- */

/* Whether a turn's end waits for what a node, or the ferry behind it, still has. A branch whose policy is not to hold
 * anybody is waited for as long as one of its sinks takes bytes. */
static int in_turn(struct pass *s, struct relay_node *n)
{
    struct relay_node *gate = n->apart ? n->apart : n;
    int64_t until, last = 0;
    int alive = 0;
    if (!gate->apart_ns || !s->p->tell_idle)
        return 1;
    if (gate == n && (n->held || n->prefix_left || (n->next && n->stash_next < n->stash_len)))
        return 1;               /* of a gate only the piece before a gap waits for its branch alone */
    for (struct relay_node *each = gate->after; each; each = each->after) {
        if (each->apart != gate || !each->sink || each->sink->failed)
            continue;
        alive = 1;
        if (each->sink->last_ns > last)
            last = each->sink->last_ns;
    }
    if (!alive)
        return 0;
    if (!s->p->idle_ns)
        s->p->idle_ns = s->e->now_ns;
    until = (last ? last : s->p->idle_ns) + gate->apart_ns;
    if (s->e->now_ns >= until)
        return 0;
    wake_at(s, until);
    return 1;
}

static int sweep(struct pass *s)
{
    struct relay_pipeline *p = s->p;
    struct relay_node *n;
    int moved, empty = 1, calm = 1, open = 0;

    p->wake_ns = 0;
    if (p->retry) {           /* an answer contradicted what was known: believe nothing remembered */
        p->retry = 0;
        if (p->source)
            p->source->readable = 1;
        for (n = p->head; n; n = n->after) {
            n->full = 0;
            if (n->sink)
                n->sink->writable = 1;
            if (n->ring)
                ring_retry(n->ring);
        }
        if (p->ring)
            ring_retry(p->ring);
    }
    do {
        if (p->ring) {
            moved = scatter(s);
            continue;
        }
        moved = fill_from_source(s);
        for (n = p->head; n; n = n->after) {
            moved |= turn(s, n);
            if (n->ring)
                moved |= ring_give(s, n->ring);
        }
    } while (moved && s->read < most_swept(s) && !ring_gave_enough(s));
    if (p->ring)
        open = scatter_settle(s, &empty, &calm);
    for (n = p->ring ? NULL : p->head; n; n = n->after) {
        struct relay_end *sink = n->sink;
        if (holds(n) && in_turn(s, n))
            empty = 0;
        if (holds(n) || n->dropping || n->ring)
            calm = 0;
        if (n->ring)
            ring_hear(s, n->ring);
        if (!sink || sink->failed)
            continue;
        if (sink->kind == RELAY_FERRY && sink->ferry) {
            ferry_flush(s, sink->ferry);
            if (__atomic_load_n(&sink->ferry->error, __ATOMIC_ACQUIRE)) {
                sink_failed(s, n, sink->ferry->error);
                continue;
            }
            if (!ferry_is_empty(sink->ferry)) {     /* its answer wakes this pipeline */
                calm = 0;
                if (in_turn(s, n))
                    empty = 0;
            }
        } else if (sink->discard && sink->readable && sink->fd >= 0) {
            int64_t error = read_and_discard(s, sink);
            if (error) {
                sink_failed(s, n, error);
                continue;
            }
        }
        if (!n->done)
            open++;
    }
    if (calm && p->still == 1 && !p->head->ended) {
        p->still = 2;
        tell(s, p->token, RELAY_STILL, 0);
    }
    pace_source(s);
    if (empty && p->tell_idle && (p->source_ended || !p->source)) {
        p->tell_idle = 0;
        p->idle_ns = 0;
        tell(s, p->token, RELAY_IDLE, 0);
    }
    if (!open && !p->done && !p->keep) {
        p->done = 1;
        tell(s, p->token, RELAY_DONE, 0);
    }
    return moved | s->again;
}

/* Whether this sweep is not measured: looking at the clock twice takes as long as moving a small message, so while
 * the sweeps move little only one of SPARED is, on average. By chance, since sweeps come in patterns. */
static int spared(struct relay_pipeline *p)
{
    if (!p->gauged && !p->cpu_ns)
        p->sweeps = 0;                  /* a new sample */
    if (p->sweeps < SPARED || p->gauged >= p->sweeps * LITTLE)
        return 0;
    p->chance = p->chance * 1664525u + 1013904223u;
    return (p->chance >> 16) % SPARED != 0;
}

int relay_pump(struct relay_engine *e, struct relay_pipeline *p, struct relay_event *out, int *count, int max)
{
    struct pass s = { .e = e, .p = p, .out = out, .count = *count, .max = max };
    int64_t fed = p->fed, began = p->gauge_until && fed >= p->gauge_from && !spared(p) ? cpu_ns() : 0;
    int more = sweep(&s);
    if (began) {
        p->cpu_ns += cpu_ns() - began;
        p->gauged += p->fed - fed;
        p->sweeps++;
    }
    if (p->gauge_until && p->fed >= p->gauge_until && p->gauged) {
        int64_t threads = gauged_by_threads(p);
        if (threads >= 0) {
            p->gauge_until = 0;
            p->cpu_ns += threads;
            tell(&s, p->token, RELAY_GAUGED, 0);
        }
    }
    *count = s.count;
    return more;
}
