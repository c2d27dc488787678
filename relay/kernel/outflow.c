/* Out of a node: tee, splice or copy to the next node, a sink, a ferry, or nowhere. See pass.h. */
#include "pass.h"

#define STUCK_NS 20000000LL

/* Bytes left the node. */
void drained(struct pass *s, struct relay_node *n, int64_t moved)
{
    n->held -= moved;
    if (n->next)
        n->owed -= moved;
    n->full = 0;
    if (n->since_ns && (n->next ? !n->owed : !n->held) && !n->into) {
        n->blocked_ns += s->e->now_ns - n->since_ns;
        n->since_ns = 0;
        if (n->slow) {
            n->slow = 0;
            tell(s, n->token, RELAY_CAUGHT_UP, 0);
        }
    }
}

/* Out of the pipe to nowhere: bytes, 0 when none come, -errno. */
int64_t throw_away(struct pass *s, struct relay_node *n, int64_t amount)
{
    int64_t moved = call_splice(n->pipe_r, NULL, s->e->null_fd, amount, 0);
    s->e->calls++;
    if (not_this_way(moved)) {
        moved = call_read(n->pipe_r, 0, s->e->scratch,
                          amount < s->e->scratch_size ? amount : s->e->scratch_size);
        s->e->calls++;
    }
    if (moved == -EAGAIN) {
        look_again(s);
        return 0;
    }
    return moved ? moved : -EIO;
}

int discard(struct pass *s, struct relay_node *n, int64_t amount)
{
    int64_t stashed = n->stash_len - n->stash_out, moved;
    if (stashed) {
        moved = amount < stashed ? amount : stashed;
        n->stash_out += moved;
    } else {
        moved = throw_away(s, n, amount);
        if (moved < 0)
            tell(s, n->token, RELAY_BROKEN, moved);
        if (moved <= 0)
            return 0;
    }
    drained(s, n, moved);
    return (int)(moved > 0);
}

int64_t give(struct relay_node *n, int to, int is_socket, int64_t amount)
{
    if (n->stash_len > n->stash_out)
        return call_write(to, is_socket, n->stash + n->stash_out, amount);
    return call_splice(n->pipe_r, NULL, to, amount, 0);
}

static int64_t give_to_sink(struct pass *s, struct relay_node *n, struct relay_end *sink, int64_t amount)
{
    int64_t moved;
    if (sink->failed)           /* its place is held for another */
        return 0;
    if (sink->kind == RELAY_FERRY)
        return give_to_ferry(s, n, amount);
    if (sink->fd < 0 || !sink->writable)
        return 0;
    moved = give(n, sink->fd, sink->is_socket, amount);
    s->e->calls++;
    if (moved == -EAGAIN || moved == 0) {
        if (sink->kind == RELAY_INSTANT || says_ready(sink->fd, POLLOUT))
            look_again(s);
        sink->writable = 0;
        return 0;
    }
    return moved;
}

static int64_t give_to_node(struct pass *s, struct relay_node *n, int64_t amount)
{
    struct relay_node *to = n->into;
    int64_t moved;
    if (refuses(to))
        return 0;
    moved = give(n, to->pipe_w, 0, amount);
    s->e->calls++;
    if (moved > 0) {
        to->held += moved;
        return moved;
    }
    if (moved == -EAGAIN) {
        not_filled(s, to);
        return 0;
    }
    return moved ? moved : -EIO;
}

/* Past an empty backlog straight to its sink. What the sink refuses goes into the backlog where that lets somebody go
 * on: when the next stage has nothing left, or could take more for as long as STUCK_NS. Otherwise it waits where it is:
 * a receiver that is a moment behind the others costs no second move. */
static int64_t give_past(struct pass *s, struct relay_node *n, int64_t amount)
{
    struct relay_node *backlog = n->into;
    struct relay_end *sink = backlog->sink;
    int64_t moved;
    if (!backlog->held && !backlog->prefix_left && sink && sink->kind != RELAY_FERRY) {
        moved = give_to_sink(s, n, sink, amount);
        if (moved > 0) {
            backlog->passed += moved;
            sink_took(s, sink, moved);
            n->stuck_ns = 0;
            return moved;
        }
        if (moved < 0 && not_this_way(moved) && n->stash_len == n->stash_out)
            return moved;
        if (moved < 0)
            sink_failed(s, backlog, moved);
    }
    if (backlog->sink && n->next && n->next->held) {
        if (!n->stuck_ns)
            n->stuck_ns = s->e->now_ns;
        if (s->e->now_ns - n->stuck_ns < STUCK_NS) {
            wake_at(s, n->stuck_ns + STUCK_NS);
            return 0;
        }
    }
    return give_to_node(s, n, amount);
}

/* Reads owed (or, where tee is done by hand too, fresh) bytes out of the pipe, to be written from memory. */
int fill_stash(struct pass *s, struct relay_node *n, int fresh)
{
    int64_t amount = fresh ? n->held : n->next ? n->owed : n->held, moved;
    if (amount > n->stash_size)
        amount = n->stash_size;
    moved = call_read(n->pipe_r, 0, n->stash, amount);
    s->e->calls++;
    if (nothing_moved(s, n, moved))
        return 0;
    n->stash_len = moved;
    n->stash_out = 0;
    n->stash_next = fresh ? 0 : moved;
    if (fresh)
        n->owed = moved;
    n->full = 0;
    return 1;
}

int tee_by_hand(struct pass *s, struct relay_node *n)
{
    int64_t moved;
    if (n->stash_next == n->stash_len || refuses(n->next))
        return 0;
    moved = call_write(n->next->pipe_w, 0, n->stash + n->stash_next, n->stash_len - n->stash_next);
    s->e->calls++;
    if (moved == -EAGAIN) {
        not_filled(s, n->next);
        return 0;
    }
    if (moved <= 0) {
        tell(s, n->token, RELAY_BROKEN, moved ? moved : EIO);
        n->stash_next = n->stash_len;
        return 0;
    }
    n->stash_next += moved;
    n->next->held += moved;
    return 1;
}

int tee_on(struct pass *s, struct relay_node *n)
{
    int64_t moved;
    if (n->tee_copies) {
        if (!n->stash || n->stash_out < n->stash_len || n->stash_next < n->stash_len)
            return 0;
        return fill_stash(s, n, 1);
    }
    if (refuses(n->next))
        return 0;
    moved = call_tee(n->pipe_r, n->next->pipe_w, n->held);
    s->e->calls++;
    if (moved > 0) {
        n->owed = moved;
        n->next->held += moved;
        return 1;
    }
    if (moved == -EAGAIN)
        not_filled(s, n->next);
    else if (not_this_way(moved)) {
        n->tee_copies = n->out_copies = 1;
        tell(s, n->token, RELAY_WANTS_COPY, moved);
    } else
        tell(s, n->token, RELAY_BROKEN, moved ? moved : EIO);
    return 0;
}

int move_out(struct pass *s, struct relay_node *n, int64_t amount)
{
    int64_t moved, before = n->held, stashed = n->stash_len - n->stash_out;

    if (n->skip) {
        int any = discard(s, n, amount < n->skip ? amount : n->skip);
        n->skip -= before - n->held;
        return any;
    }
    if (n->dropping)
        return drop(s, n, amount);
    if (!n->left || (!n->into && !n->sink)) {
        int any = discard(s, n, amount);
        if (n->left || n->cut)
            n->dropped += before - n->held;
        return any;
    }
    amount = gate(s, n, amount);
    if (!amount)
        return 0;
    moved = n->past ? give_past(s, n, amount) : n->into ? give_to_node(s, n, amount)
        : n->ring ? ring_take(s, n, amount) : give_to_sink(s, n, n->sink, amount);
    if (moved == 0) {
        if (!n->past || refuses(n->into))
            blocked(s, n);
        return 0;
    }
    if (moved < 0) {
        if (!n->into && (!n->sink || n->sink->failed))      /* the ferry failed and was told of */
            return !n->sink;
        if (not_this_way(moved) && !stashed) {
            n->out_copies = 1;
            tell(s, n->token, RELAY_WANTS_COPY, moved);
            return 0;
        }
        if (n->sink) {
            sink_failed(s, n, moved);
            return 1;
        }
        tell(s, n->token, RELAY_BROKEN, moved);
        return 0;
    }
    if (stashed)
        n->stash_out += moved;
    n->passed += moved;
    if (n->rate)
        n->tokens -= (double)moved;
    if (n->left > 0)
        n->left -= moved;
    if (n->sink)
        sink_took(s, n->sink, moved);
    drained(s, n, moved);
    if (!n->left && n->into)
        n->into->ended = 1;
    return 1;
}
