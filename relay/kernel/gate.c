/* How much may leave a node, and what happens when it cannot: rates, slow ways out, gaps. See pass.h. */
#include "pass.h"

#include <string.h>

/* The way out is full. A node is slow when it was so for after_ns without having emptied again. */
void blocked(struct pass *s, struct relay_node *n)
{
    if (!n->after_ns)
        return;
    if (!n->since_ns)
        n->since_ns = s->e->now_ns;
    if (n->slow)
        return;
    if (s->e->now_ns - n->since_ns >= n->after_ns) {
        n->slow = 1;
        tell(s, n->token, RELAY_SLOW, 0);
    } else {
        wake_at(s, n->since_ns + n->after_ns);
    }
}

/* What is behind this node has emptied: it is no longer full, and no longer slow. */
void into_emptied(struct pass *s, struct relay_node *n)
{
    if (!n->since_ns)
        return;
    n->blocked_ns += s->e->now_ns - n->since_ns;
    n->since_ns = 0;
    if (n->slow && !n->dropping) {
        n->slow = 0;
        tell(s, n->token, RELAY_CAUGHT_UP, 0);
    }
}

/* How much may pass the gate now: whole quanta of the rate, so that a slow rate is not a dribble. */
int64_t gate(struct pass *s, struct relay_node *n, int64_t amount)
{
    int64_t now = s->e->now_ns, quantum;
    if (n->left >= 0 && amount > n->left)
        amount = n->left;
    if (!n->rate || !amount)
        return amount;
    if (!n->stamp_ns) {
        n->stamp_ns = now;
        n->tokens = (double)n->burst;
    }
    n->tokens += (double)(now - n->stamp_ns) * (double)n->rate / 1e9;
    n->stamp_ns = now;
    if (n->tokens > (double)n->burst)
        n->tokens = (double)n->burst;
    quantum = n->rate / 100;            /* 10 ms' worth */
    if (quantum > n->burst)
        quantum = n->burst;
    if (quantum > amount)
        quantum = amount;
    if (quantum < 1)
        quantum = 1;
    if (n->tokens < (double)quantum) {
        double wait = ((double)quantum - n->tokens) * 1e9 / (double)n->rate;
        wake_at(s, now + (int64_t)wait + 1);
        return 0;
    }
    return (double)amount > n->tokens ? (int64_t)n->tokens : amount;
}

#define TURNS ((int)(sizeof((struct relay_turns *)0)->origins / sizeof(int64_t)))

/* The first border at or behind `at`, or (down) the last at or before it. Before the oldest stream that is
 * remembered the next border known is that stream's beginning. */
int64_t border(const struct relay_turns *turns, int64_t align, int64_t at, int down)
{
    int64_t origin = 0, next = -1, over;
    int known = turns->count < TURNS ? turns->count : TURNS;
    for (int i = 1; i <= known; i++) {
        origin = turns->origins[(turns->count - i) % TURNS];
        if (origin <= at)
            break;
        next = origin;
    }
    if (origin > at)
        return origin;
    over = (at - origin) % align;
    if (down || !over)
        return at - over;
    at += align - over;
    return next >= 0 && next < at ? next : at;
}

void turn_begins(struct relay_turns *turns, int64_t at)
{
    if (!turns->count || turns->origins[(turns->count - 1) % TURNS] != at)
        turns->origins[turns->count++ % TURNS] = at;
}

/* What the gate still holds is of the streams before; a piece that they did not finish stays as it is. */
void relay_gate_stream(struct relay_node *n)
{
    turn_begins(&n->turns, n->passed + n->dropped + n->held);
    if (n->rest_need > n->rest_have + n->held)
        n->rest_need = n->rest_have + n->held;
}

void relay_gate_drop(struct relay_node *n)
{
    int64_t at = n->passed + n->dropped;
    n->dropping = 1;
    n->rest_have = 0;
    n->rest_need = border(&n->turns, n->align, at, 0) - at;
}

/* A gap begins and ends between pieces of `align` bytes, counted from its stream's first byte. The piece that
 * was under way when it began is kept aside (at most align - 1 bytes) and goes out before anything else. */
int drop(struct pass *s, struct relay_node *n, int64_t amount)
{
    struct relay_node *to = n->into;
    int64_t moved, to_border, before, at;
    int any;
    if (n->rest_have < n->rest_need) {
        int64_t want = n->rest_need - n->rest_have;
        if (want > amount)
            want = amount;
        if (n->stash_len > n->stash_out) {
            int64_t stashed = n->stash_len - n->stash_out;
            moved = want < stashed ? want : stashed;
            memcpy(n->stash + n->stash_size + n->rest_have, n->stash + n->stash_out, (size_t)moved);
            n->stash_out += moved;
        } else {
            moved = call_read(n->pipe_r, 0, n->stash + n->stash_size + n->rest_have, want);
            s->e->calls++;
        }
        if (nothing_moved(s, n, moved))
            return 0;
        n->rest_have += moved;
        n->passed += moved;
        drained(s, n, moved);
        return 1;
    }
    if (to && !to->held && !refuses(to)) {
        if (n->rest_have) {           /* an empty pipe takes it whole: it is less than a page's slots */
            moved = call_write(to->pipe_w, 0, n->stash + n->stash_size, n->rest_have);
            s->e->calls++;
            if (nothing_moved(s, n, moved))
                return 0;
            to->held += moved;
            memmove(n->stash + n->stash_size, n->stash + n->stash_size + moved,
                    (size_t)(n->rest_have - moved));
            n->rest_have -= moved;
            n->rest_need = n->rest_have;
            return 1;
        }
        n->rest_need = 0;
        at = n->passed + n->dropped;
        to_border = border(&n->turns, n->align, at, 0) - at;
        if (!to_border) {
            n->dropping = 0;
            into_emptied(s, n);
            return 1;
        }
        if (amount > to_border)
            amount = to_border;
    }
    if (!n->held)
        return 0;
    before = n->held;
    any = discard(s, n, amount);
    n->dropped += before - n->held;
    return any;
}
