/* A ring: one read into memory, one send a reader out of it. See pass.h.
 *
 * Positions count the bytes that ever came to the ring; a reader's is that of the next byte it gets, and the byte
 * at position x lies at (x - base) % size. So a newcomer that wants the last bytes begins at an earlier position, and
 * nothing can be doubled or missing at the seam. The ring is every reader's backlog at once: its size is the
 * memory that it takes, however many read. A reader that is more than `full` behind is full, and its time
 * runs; what the ring has beyond that is reserve, so that it need not hold the source meanwhile. It does when the
 * ring has no room. One that drops holds nobody: it skips to a later position. */
#include "pass.h"

#include <string.h>

#define GIVEN (16 << 20)    /* bytes to readers after which other pipelines have their turn */
#define FEWEST (64 << 10)   /* bytes that are taken at a time, however many readers there are */

static int holding(const struct relay_reader *r)
{
    return r->sink && (!r->sink->failed || r->hold) && !r->done && !r->dropping;
}

static void find_oldest(struct relay_ring *ring)
{
    ring->oldest = ring->position;
    for (struct relay_reader *r = ring->readers; r; r = r->after) {
        take_back_spans(r);
        if ((holding(r) || has_spans(r)) && needs_from(r) < ring->oldest)
            ring->oldest = needs_from(r);
    }
}

/* Whether nobody has anything to get of what has come. */
int ring_is_empty(const struct relay_ring *ring)
{
    for (struct relay_reader *r = ring->readers; r; r = r->after) {
        take_back_spans(r);
        if (r->dropping || has_spans(r) || (holding(r) && r->at < ring->position))
            return 0;
    }
    return 1;
}

/* Readers tell only into room that no node needs; what finds none is told in the next sweep. */
static int may_tell(struct pass *s)
{
    if (s->max - s->count >= 4 * s->p->nodes + 16 + 4)
        return 1;
    s->again = 1;
    return 0;
}

static void no_longer_full(struct pass *s, struct relay_reader *r)
{
    if (!r->since_ns)
        return;
    r->blocked_ns += s->e->now_ns - r->since_ns;
    r->since_ns = 0;
    if (r->slow) {
        r->slow = 0;
        tell(s, r->token, RELAY_CAUGHT_UP, 0);
    }
}

/* Those far behind are full, and slow when they were so for after_ns without having emptied again. */
static void judge(struct pass *s, struct relay_ring *ring)
{
    for (struct relay_reader *r = ring->readers; r; r = r->after) {
        if (!holding(r) || !r->after_ns || ring->position - needs_from(r) <= ring->full)
            continue;
        if (!r->since_ns)
            r->since_ns = s->e->now_ns;
        if (r->slow)
            continue;
        if (s->e->now_ns - r->since_ns < r->after_ns) {
            wake_at(s, r->since_ns + r->after_ns);
        } else if (may_tell(s)) {
            r->slow = 1;
            tell(s, r->token, RELAY_SLOW, 0);
        }
    }
}

/* Bytes of `wanted` that there is room for, in one piece. Room that is little is none: else one reader that takes
 * little at a time would have all others served in dribbles. */
int64_t ring_room(struct pass *s, struct relay_ring *ring, int64_t wanted)
{
    int64_t room = ring->size - (ring->position - ring->oldest), behind;
    if (room < wanted) {
        find_oldest(ring);
        room = ring->size - (ring->position - ring->oldest);
    }
    ring->tight = room < wanted && room < ring->size / 8;
    if (ring->tight) {
        judge(s, ring);
        return 0;
    }
    behind = ring->size - place(ring, ring->position);
    if (wanted > room)
        wanted = room;
    return wanted < behind ? wanted : behind;
}

/* Bytes came into the ring, at its position. */
void ring_came(struct pass *s, struct relay_ring *ring, int64_t moved)
{
    ring->position += moved;
    if (ring->position - ring->oldest > ring->full) {
        find_oldest(ring);
        judge(s, ring);
    }
}

/* Bytes moved from the node into its ring, 0 when there is no room, -errno. */
int64_t ring_take(struct pass *s, struct relay_node *n, int64_t amount)
{
    struct relay_ring *ring = n->ring;
    int64_t stashed = n->stash_len - n->stash_out, most = ring->count ? GIVEN / ring->count : GIVEN;
    int64_t moved;
    char *to;

    if (!ring->memory) {                /* nobody reads and nothing is kept */
        moved = stashed ? (amount < stashed ? amount : stashed) : throw_away(s, n, amount);
        if (moved > 0)
            ring->start = ring->oldest = ring->offered = ring->position += moved;
        return moved;
    }
    if (most < FEWEST)
        most = FEWEST;
    amount = ring_room(s, ring, amount < most ? amount : most);
    if (!amount)
        return 0;
    to = ring->memory + place(ring, ring->position);
    if (stashed) {
        moved = amount < stashed ? amount : stashed;
        memcpy(to, n->stash + n->stash_out, (size_t)moved);
    } else {
        moved = call_read(n->pipe_r, 0, to, amount);
        s->e->calls++;
        if (moved == -EAGAIN) {
            look_again(s);
            return 0;
        }
        if (!moved)
            return -EIO;
    }
    if (moved > 0) {
        ring_came(s, ring, moved);
        ring->offered = ring->position;
    }
    return moved;
}

static void reader_failed(struct pass *s, struct relay_reader *r, int64_t error)
{
    r->sink->failed = 1;
    r->sink->readable = r->sink->writable = 0;
    tell(s, r->sink->token, RELAY_SINK_FAILED, error);
    if (r->stays && !r->hold) {
        r->sink = NULL;
        r->since_ns = 0;
    }
}

/* A place without a sink: what comes for it goes by. */
static void go_by(const struct relay_ring *ring, struct relay_reader *r)
{
    r->dropped += ring->position - r->at + r->rest_left;
    r->at = ring->position;
    r->rest_left = 0;
    r->dropping = r->slow = 0;
    r->since_ns = 0;
}

/* The gap is over: the reader goes on at the last border that has come, if it is still in memory: nothing is kept for
 * one that drops. */
static int end_gap(struct pass *s, struct relay_ring *ring, struct relay_reader *r, int64_t to)
{
    if (to < r->at || to < ring->position - ring->size)
        return 0;
    r->dropped += to - r->at;
    r->at = to;
    r->dropping = 0;
    if (r->at < ring->oldest)
        ring->oldest = r->at;
    no_longer_full(s, r);
    return 1;
}

/* As below, where a thread takes them: spans of the ring. */
static int span_turn(struct pass *s, struct relay_ring *ring, struct relay_reader *r)
{
    int any = 0;
    take_back_spans(r);
    while (r->at < ring->offered || r->dropping) {
        int64_t moved;
        if (r->dropping && !(ferry_has(r->ferry, r->ferry->at) && end_gap(s, ring, r, ring->offered)))
            break;
        moved = r->at < ring->offered ? give_span(s, ring, r) : 0;
        if (!moved)
            break;
        sink_took(s, r->sink, moved);
        s->given += moved;
        any = 1;
    }
    return any;
}

/* Sends a reader what it can take: whether anything moved, -errno where its sink failed. */
static int64_t send_turn(struct pass *s, struct relay_ring *ring, struct relay_reader *r)
{
    struct relay_end *sink = r->sink;
    int any = 0;

    while (sink->writable && sink->fd >= 0) {
        const char *from;
        int64_t amount, moved;
        if (r->rest_left) {
            from = r->rest;
            amount = r->rest_left;
        } else if (r->dropping) {
            if (!end_gap(s, ring, r, border(&ring->turns, r->align, ring->offered, 1)))
                break;
            any = 1;
            continue;
        } else if (r->at < ring->offered) {
            int64_t lies = place(ring, r->at);
            from = ring->memory + lies;
            amount = ring->offered - r->at;
            if (amount > ring->size - lies)
                amount = ring->size - lies;
        } else {
            break;
        }
        moved = call_write(sink->fd, sink->is_socket, from, amount);
        s->e->calls++;
        if (moved == -EAGAIN || !moved) {
            if (sink->kind == RELAY_INSTANT || says_ready(sink->fd, POLLOUT))
                look_again(s);
            sink->writable = 0;
            break;
        }
        if (moved < 0)
            return moved;
        if (r->rest_left) {
            r->rest += moved;
            r->rest_left -= moved;
        } else {
            r->at += moved;
        }
        sink_took(s, sink, moved);
        s->given += moved;
        any = 1;
    }
    return any;
}

static int reader_turn(struct pass *s, struct relay_ring *ring, struct relay_reader *r)
{
    struct relay_end *sink = r->sink;
    int64_t done;
    int any;

    if (sink->kind == RELAY_FERRY) {
        int error = __atomic_load_n(&sink->ferry->error, __ATOMIC_ACQUIRE);
        done = error ? -error : span_turn(s, ring, r);
    } else {
        done = send_turn(s, ring, r);
    }
    if (done < 0) {
        reader_failed(s, r, done);
        return 1;
    }
    any = (int)done;
    if (r->dropping && !r->rest_left && ring->ended)
        any |= end_gap(s, ring, r, ring->position);
    if (r->at >= ring->offered && !r->rest_left && !r->dropping) {
        no_longer_full(s, r);
        if (ring->ended) {
            r->done = 1;
            tell(s, sink->token, RELAY_SINK_DRAINED, 0);
            any = 1;
        }
    }
    return any;
}

/* Gives every reader what has come; whether anything moved. */
int ring_give(struct pass *s, struct relay_ring *ring)
{
    int moved = 0;
    for (struct relay_reader *r = ring->readers; r; r = r->after) {
        if (!r->sink) {
            go_by(ring, r);
            continue;
        }
        if (r->sink->failed || r->done || (r->sink->fd < 0 && !r->ferry && !(r->stays && ring->ended)))
            continue;
        if (r->at >= ring->offered && !r->dropping && !r->since_ns && !ring->ended && !r->ferry)
            continue;                   /* nothing to do, which most of them have most of the time */
        if (!may_tell(s))
            return moved;
        moved |= reader_turn(s, ring, r);
    }
    return moved;
}

int ring_gave_enough(const struct pass *s) { return s->given >= GIVEN; }

/* What readers send is thrown away, as for any one-way sink. */
void ring_hear(struct pass *s, struct relay_ring *ring)
{
    for (struct relay_reader *r = ring->readers; r; r = r->after) {
        int64_t error;
        if (!r->sink || !r->sink->readable || !r->sink->discard || r->sink->failed || r->sink->fd < 0)
            continue;
        if (!may_tell(s))
            return;
        error = read_and_discard(s, r->sink);
        if (error)
            reader_failed(s, r, error);
    }
}

/* After a contradiction: everybody may be ready. */
void ring_retry(struct relay_ring *ring)
{
    for (struct relay_reader *r = ring->readers; r; r = r->after)
        if (r->sink && !r->sink->failed)
            r->sink->writable = 1;
}

void relay_ring_join(struct relay_ring *ring, struct relay_reader *r)
{
    int64_t from = ring->position - ring->keep;
    if (from < ring->start)
        from = ring->start;
    if (from < ring->position - ring->size)
        from = ring->position - ring->size;
    r->at = r->stays ? ring->position : border(&ring->turns, r->align, from, 0);
    if (r->at < ring->oldest)
        ring->oldest = r->at;
    r->after = ring->readers;
    ring->readers = r;
    ring->count++;
}

void relay_ring_leave(struct relay_ring *ring, struct relay_reader *gone)
{
    for (struct relay_reader **at = &ring->readers; *at; at = &(*at)->after)
        if (*at == gone) {
            *at = gone->after;
            ring->count--;
            return;
        }
}

void relay_ring_drop(struct relay_ring *ring, struct relay_reader *r, char *rest)
{
    int64_t from = r->at, to = border(&ring->turns, r->align, from, 0);
    if (r->dropping)
        return;
    if (to > ring->position)
        to = from;                      /* cannot be: it is far behind; then the gap begins where it stands */
    r->rest = rest;
    r->rest_left = to - from;
    for (int64_t at = from; at < to; at++)
        rest[at - from] = ring->memory[place(ring, at)];
    r->at = to;
    r->dropping = 1;
}

void relay_ring_stream(struct relay_ring *ring)
{
    turn_begins(&ring->turns, ring->position);
    for (struct relay_reader *r = ring->readers; r; r = r->after)
        if (r->at > ring->position)     /* it waited for a border, and here is one */
            r->at = ring->position;
}
