/* Loads for a ferry's thread: which bytes are in them, and when they are handed over. See pass.h.
 *
 * Each load costs two wake-ups, which is as much as copying 100 KiB: few large ones are cheaper than many small
 * ones. So in a rush (the last load was a large one) a small load waits for more, for HOLD_NS at most; a load of a
 * stream in no hurry goes at once. In a rush a source that is a tcp socket wakes nobody before a whole load is there
 * (SO_RCVLOWAT); the peer's end, a shut window and the timer still do (tcp_data_ready).
 *
 * A file is filled by copying whichever way its bytes come: splice copies out of the pages of the pipe, page by page.
 * So a tcp socket whose only taker is a file is read straight into memory that the thread writes from: no pipe, two
 * large copies, of which the second finds the bytes in the cache. Loads end at multiples of their size in the
 * stream, since aligned writes are cheaper. */
#include "pass.h"

#define HOLD_NS 1000000LL
#define RUSH (256 << 10)         /* bytes of a load after which more are expected at once */

/* A load that is back tells what the thread took for it, if anybody asked. */
static void weigh(struct relay_ferry *f, int k)
{
    if (!f->tag[k] || !ferry_has(f, k))
        return;
    if (f->sample != f->tag[k]) {
        f->sample = f->tag[k];
        f->weighed = f->weighed_ns = 0;
    }
    f->weighed += f->sizes_of[k];
    f->weighed_ns += f->took_ns[k];
    f->tag[k] = 0;
}

/* What the threads that a pipeline hands loads to took for the bytes that were measured: of each the time of a byte in
 * its loads of this sample, as far as they are back; -1 while none of one of them is. */
int64_t gauged_by_threads(const struct relay_pipeline *p)
{
    double all = 0;
    for (const struct relay_node *n = p->head; n; n = n->after) {
        struct relay_ferry *f = n->sink && !n->sink->failed && n->sink->kind == RELAY_FERRY ? n->sink->ferry : NULL;
        if (!f)
            continue;
        weigh(f, 0);
        weigh(f, 1);
        if (f->sample != p->sample || !f->weighed)
            return -1;
        all += (double)f->weighed_ns / (double)f->weighed;
    }
    return (int64_t)(all * (double)p->gauged);
}

static void hand_over(const struct relay_pipeline *p, struct relay_ferry *f, int rush)
{
    uint64_t one = 1;
    int k = f->at;
    weigh(f, k);
    f->tag[k] = p->gauge_until && p->fed >= p->gauge_from ? p->sample : 0;
    f->sizes_of[k] = f->load[k];
    f->at ^= 1;
    f->rush = rush;
    __atomic_store_n(&f->turn[k], RELAY_WITH_THREAD, __ATOMIC_RELEASE);
    while (write(f->knock, &one, sizeof one) < 0 && errno == EINTR) {}
}

/* Of a load that comes back the thread tells only when it was asked to; what came back before is seen by whoever
 * looks after asking. */
static void ask(struct relay_ferry *f)
{
    __atomic_store_n(&f->asked, 1, __ATOMIC_SEQ_CST);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* The end of a sweep: a load that is not full is handed over when the thread is idle, and nothing is to be gained
 * by waiting for more. */
void ferry_flush(struct pass *s, struct relay_ferry *f)
{
    const struct relay_pipeline *p = s->p;
    int k = f->at, load = ferry_has(f, k) && f->load[k];
    int hold = load && f->rush && p->source && !p->source_ended && s->e->now_ns < f->since_ns + HOLD_NS;
    if (f->refused || p->tell_idle || (load && !hold))
        ask(f);
    if (f->refused && ferry_has(f, k)) {
        f->refused = 0;
        s->again = 1;
    }
    if (hold)
        wake_at(s, f->since_ns + HOLD_NS);
    if (!load || hold || !ferry_has(f, k ^ 1))
        return;
    hand_over(s->p, f, f->load[k] >= RUSH);
    if (p->tell_idle)
        ask(f);
}

/* Moves at most `amount` bytes from a node into the load's pipe: bytes moved, 0 when it cannot take any now,
 * -1 when the ferry failed. */
int64_t give_to_ferry(struct pass *s, struct relay_node *n, int64_t amount)
{
    struct relay_ferry *f = n->sink->ferry;
    int64_t moved = 0;
    if (!f)                     /* its thread is not there yet */
        return 0;
    for (int tries = 0; tries < 3; tries++) {
        int k = f->at;
        if (__atomic_load_n(&f->error, __ATOMIC_ACQUIRE)) {
            sink_failed(s, n, f->error);
            return -1;
        }
        if (!ferry_has(f, k)) {     /* both away: the sink is slow */
            f->refused = 1;
            return 0;
        }
        if (f->load[k] && f->span[k]) {
            hand_over(s->p, f, 0);
            continue;
        }
        f->span[k] = NULL;
        moved = give(n, f->pipe_w[k], 0, amount);
        s->e->calls++;
        if (moved > 0) {
            f->refused = 0;
            if (!f->load[k])
                f->since_ns = s->e->now_ns;
            f->load[k] += moved;
            return moved;
        }
        if (moved != -EAGAIN)
            return moved;
        if (!f->load[k]) {
            look_again(s);
            return 0;
        }
        hand_over(s->p, f, f->load[k] >= RUSH);
    }
    return 0;
}

/* Whether what the source gives can pass by this node's pipe, into the memory of its sink's ferry. */
int goes_straight(const struct relay_node *head)
{
    const struct relay_end *sink = head->sink;
    return sink && !sink->failed && sink->kind == RELAY_FERRY && sink->ferry && sink->ferry->memory && !head->next && !head->into
        && !head->held && !head->rate && head->left < 0 && !head->skip && !head->dropping;
}

int fill_ferry(struct pass *s, struct relay_node *head)
{
    struct relay_end *sink = head->sink;
    struct relay_ferry *f = sink->ferry;
    int k = f->at;
    int64_t moved;
    if (!ferry_has(f, k)) {
        f->refused = 1;
        blocked(s, head);
        return 0;
    }
    if (f->load[k] && !f->span[k]) {
        hand_over(s->p, f, 0);
        return 1;
    }
    if (!f->load[k]) {
        f->span[k] = f->memory + k * f->room;
        f->most = f->room - sink->moved % f->room;
        f->since_ns = s->e->now_ns;
    }
    moved = read_source(s, f->span[k] + f->load[k], f->most - f->load[k]);
    if (moved <= 0)
        return s->p->source_ended;
    f->refused = 0;
    f->load[k] += moved;
    head->passed += moved;
    sink_took(s, sink, moved);
    drained(s, head, 0);        /* it is not slow, and holds nothing */
    source_took(s, moved);
    if (f->load[k] == f->most)
        hand_over(s->p, f, 1);
    return 1;
}

/* What the thread has written of a ring, or will not write any more. */
void take_back_spans(struct relay_reader *r)
{
    struct relay_ferry *f = r->ferry;
    if (!has_spans(r))
        return;
    for (int i = 0; i < 2; i++) {
        int k = f->at ^ i;      /* the elder first */
        if (!r->ends[k] || !ferry_has(f, k))
            continue;
        r->kept = r->ends[k];
        r->ends[k] = 0;
    }
}

/* Hands the thread the next span of a ring: bytes, 0 when it has two, or when a larger one is better waited for. */
int64_t give_span(struct pass *s, const struct relay_ring *ring, struct relay_reader *r)
{
    struct relay_ferry *f = r->ferry;
    int64_t amount = ring->offered - r->at, lies = place(ring, r->at);
    int64_t most = RELAY_PIECE - r->sink->moved % RELAY_PIECE;
    int k = f->at;
    if (ferry_has(f, k) && f->load[k]) {
        hand_over(s->p, f, 0);        /* it came down the chain */
        k = f->at;
    }
    if (!ferry_has(f, k))
        return 0;
    if (most > ring->size - lies)
        most = ring->size - lies;
    if (amount >= most)
        amount = most;
    else if (!ferry_has(f, k ^ 1) && !ring->ended)
        return 0;
    if (!has_spans(r))
        r->kept = r->at;
    r->at += amount;
    r->ends[k] = r->at;
    f->span[k] = ring->memory + lies;
    f->load[k] = amount;
    s->e->calls++;
    hand_over(s->p, f, 0);
    return amount;
}

/* The end of a sweep: the thread tells of a span it gives back where that is waited for. */
void ask_for_spans(struct pass *s, const struct relay_ring *ring, struct relay_reader *r)
{
    struct relay_ferry *f = r->ferry;
    int waits = r->sink && !r->done && r->at < ring->offered;
    int64_t kept;
    take_back_spans(r);
    if (!has_spans(r) || !(waits || ring->tight || s->p->tell_idle || s->p->still))
        return;
    kept = r->kept;
    ask(f);
    take_back_spans(r);
    if (r->kept != kept)
        s->again = 1;
}

static void set_mark(struct relay_end *source, int mark)
{
    int bytes = mark ? mark : 1;
    if (setsockopt(source->fd, SOL_SOCKET, SO_RCVLOWAT, &bytes, sizeof bytes) == 0 || !mark)
        source->mark = mark;
}

/* The end of a sweep: the mark goes up in a rush, and down when what comes in HOLD_NS does not reach it. What is
 * there by then is read, since nothing has told of it. */
void pace_source(struct pass *s)
{
    struct relay_pipeline *p = s->p;
    struct relay_end *source = p->source;
    struct relay_ferry *f;
    if (!source || source->fd < 0 || !source->is_socket || source->readable || p->source_ended)
        return;
    f = source->method == RELAY_COPY && !p->paused && !p->ring && goes_straight(p->head) ? p->head->sink->ferry : NULL;
    if (f && source->mark && !ferry_has(f, f->at)) {    /* a load that comes back is the next thing to wait for */
        ask(f);
        s->again |= ferry_has(f, f->at);
        return;
    }
    if (f && f->rush && s->e->now_ns < source->last_ns + HOLD_NS) {
        if (!source->mark)
            set_mark(source, (int)f->room);
        if (source->mark)
            wake_at(s, source->last_ns + HOLD_NS);
    } else if (source->mark) {
        set_mark(source, 0);
        source->readable = 1;
        s->again = 1;
        if (f)
            f->rush = 0;
    }
}
