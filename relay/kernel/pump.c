/* The pump: one sweep moves all that can move through one pipeline, head to tail.
 *
 * What the accounting knows, the kernel is never asked: a node holds fed - drained bytes. So
 * - EAGAIN while filling an empty pipe can only mean that the giving side is empty (or a passing fault);
 * - EAGAIN while filling one that holds bytes may mean either: the node is `full` until it is drained,
 *   and then asked once more;
 * - EAGAIN while draining can only mean that the taking side is full.
 * An edge-triggered readiness flag is cleared only by EAGAIN. Should an EAGAIN contradict what poll(2) or
 * the accounting says, the pipeline looks again after RETRY_NS: it neither hangs nor spins. */
#include "calls.h"

#include <poll.h>
#include <string.h>
#include <time.h>

#define RETRY_NS 10000000LL

struct pass {                 /* one sweep's working state */
    struct relay_engine *e;
    struct relay_pipeline *p;
    struct relay_event *out;
    int count, max;
    int64_t read;             /* bytes taken from the source in this sweep */
};

static void tell(struct pass *s, uint64_t token, int what, int64_t error)
{
    if (s->count < s->max) {
        struct relay_event *event = &s->out[s->count++];
        event->token = token;
        event->what = what;
        event->error = (int32_t)(error < 0 ? -error : error);
        event->mask = 0;
    }
}

static void wake_at(struct pass *s, int64_t when)
{
    if (!s->p->wake_ns || when < s->p->wake_ns)
        s->p->wake_ns = when;
}

static void look_again(struct pass *s)
{
    s->p->retry = 1;
    wake_at(s, s->e->now_ns + RETRY_NS);
}

static int says_ready(int fd, short events)
{
    struct pollfd one = { .fd = fd, .events = events };
    return poll(&one, 1, 0) > 0;
}

static void sink_failed(struct pass *s, struct relay_node *n, int64_t error)
{
    struct relay_end *sink = n->sink;
    sink->failed = 1;
    n->sink = NULL;
    n->since_ns = 0;
    tell(s, sink->token, RELAY_SINK_FAILED, error);
}

/* ---- into a node -------------------------------------------------------------------------------- */

static int refuses(const struct relay_node *n) { return n->full || n->prefix_left; }

/* What a failed attempt to fill a node means, from where nothing came (see the top of this file). */
static void not_filled(struct pass *s, struct relay_node *n)
{
    if (n->held > n->stash_len - n->stash_out)
        n->full = 1;
    else
        look_again(s);
}

/* The prefix goes in before anything else: feeders wait while it lasts. */
static int fill_prefix(struct pass *s, struct relay_node *n)
{
    int64_t moved = call_lend(n->pipe_w, n->prefix, n->prefix_left);
    s->e->calls++;
    if (not_this_way(moved)) {
        moved = call_write(n->pipe_w, 0, n->prefix, n->prefix_left);
        s->e->calls++;
    }
    if (moved == -EAGAIN) {
        if (!n->held)
            look_again(s);
        return 0;
    }
    if (moved <= 0) {
        n->prefix_left = 0;
        tell(s, n->token, RELAY_BROKEN, moved ? moved : EIO);
        return 0;
    }
    n->prefix += moved;
    n->prefix_left -= moved;
    n->held += moved;
    return 1;
}

static void source_over(struct pass *s, int what, int64_t error)
{
    struct relay_pipeline *p = s->p;
    p->source_ended = 1;
    if (!p->keep)
        p->head->ended = 1;
    tell(s, p->token, what, error);
}

static int source_took(struct pass *s, int64_t moved)
{
    struct relay_end *source = s->p->source;
    source->moved += moved;
    source->last_ns = s->e->now_ns;
    s->p->fed += moved;
    s->read += moved;
    if (source->left > 0)
        source->left -= moved;
    return 1;
}

static void source_empty(struct pass *s, struct relay_end *source)
{
    if (source->kind == RELAY_INSTANT || says_ready(source->fd, POLLIN))
        look_again(s);
    source->readable = 0;
}

/* A head with nothing to tee and a sink that is written by hand needs no pipe between: the source is read
 * into the stash. Otherwise a copying source is read only into an empty pipe, where it surely fits. */
static int fill_by_hand(struct pass *s, struct relay_node *head)
{
    struct relay_end *source = s->p->source;
    int direct = head->out_copies && head->stash && !head->next && head->stash_out == head->stash_len;
    char *to = direct ? head->stash : s->e->scratch;
    int64_t most = direct ? head->stash_size : s->e->scratch_size, moved;
    if (head->held)
        return 0;
    if (!direct && most > head->capacity)
        most = head->capacity;
    if (source->left >= 0 && most > source->left)
        most = source->left;
    if (source->memory) {
        memcpy(to, source->memory + source->offset, (size_t)most);
        moved = most;
    } else if (source->offset >= 0) {
        moved = call_pread(source->fd, to, most, source->offset);
    } else {
        moved = call_read(source->fd, source->is_socket, to, most);
    }
    s->e->calls++;
    if (moved == -EAGAIN) {
        source_empty(s, source);
        return 0;
    }
    if (moved <= 0) {
        source_over(s, moved ? RELAY_SOURCE_FAILED : RELAY_SOURCE_ENDED, moved);
        return 1;
    }
    if (source->offset >= 0)
        source->offset += moved;
    if (direct) {
        head->stash_len = moved;
        head->stash_out = 0;
        head->stash_next = moved;
    } else {
        int64_t written = 0;
        while (written < moved) {
            int64_t w = call_write(head->pipe_w, 0, to + written, moved - written);
            s->e->calls++;
            if (w == -EAGAIN)   /* an empty pipe takes its capacity: only a passing fault says no */
                continue;
            if (w <= 0) {
                tell(s, head->token, RELAY_BROKEN, w ? w : EIO);
                source_over(s, RELAY_SOURCE_FAILED, w ? w : EIO);
                moved = written;
                break;
            }
            written += w;
        }
    }
    head->held += moved;
    return source_took(s, moved);
}

static int fill_from_source(struct pass *s)
{
    struct relay_pipeline *p = s->p;
    struct relay_node *head = p->head;
    struct relay_end *source = p->source;
    int64_t most = RELAY_PIECE, moved;
    loff_t offset;

    if (!source || p->source_ended || p->paused || head->ended || refuses(head))
        return 0;
    if (source->left == 0) {
        source_over(s, RELAY_SOURCE_ENDED, 0);
        return 1;
    }
    if (source->fd < 0 && !source->memory)
        return 0;
    if (!source->readable)
        return 0;
    if (source->left > 0 && most > source->left)
        most = source->left;
    if (source->method == RELAY_COPY)
        return fill_by_hand(s, head);
    if (source->method == RELAY_SENDFILE) {
        struct relay_end *sink = head->sink;
        if (!sink || head->held || !sink->writable || sink->fd < 0)
            return 0;
        offset = source->offset;
        moved = call_sendfile(sink->fd, source->fd, source->offset < 0 ? NULL : &offset, most);
        s->e->calls++;
        if (moved > 0) {
            if (source->offset >= 0)
                source->offset = offset;
            sink->moved += moved;
            sink->last_ns = s->e->now_ns;
            head->passed += moved;
            return source_took(s, moved);
        }
        if (moved == 0) {
            source_over(s, RELAY_SOURCE_ENDED, 0);
            return 1;
        }
        if (moved == -EAGAIN) {
            if (says_ready(sink->fd, POLLOUT))
                look_again(s);
            sink->writable = 0;
            return 0;
        }
        /* which side failed? a pipe between them tells */
        source->method = RELAY_SPLICE;
        return 1;
    }
    if (source->method == RELAY_VMSPLICE) {
        moved = call_lend(head->pipe_w, source->memory + source->offset, most);
        if (moved > 0)
            source->offset += moved;
    } else if (source->offset >= 0) {
        offset = source->offset;
        moved = call_splice(source->fd, &offset, head->pipe_w, most, 0);
        if (moved > 0)
            source->offset = offset;
    } else {
        moved = call_splice(source->fd, NULL, head->pipe_w, most, 0);
    }
    s->e->calls++;
    if (moved > 0) {
        head->held += moved;
        return source_took(s, moved);
    }
    if (moved == 0) {
        source_over(s, RELAY_SOURCE_ENDED, 0);
        return 1;
    }
    if (moved == -EAGAIN) {
        if (head->held)
            head->full = 1;
        else
            source_empty(s, source);
        return 0;
    }
    if (not_this_way(moved)) {
        source->method = RELAY_COPY;
        tell(s, p->token, RELAY_SOURCE_COPIES, moved);
        return 1;
    }
    source_over(s, RELAY_SOURCE_FAILED, moved);
    return 1;
}

/* ---- out of a node ------------------------------------------------------------------------------ */

/* Bytes left the node; `into_stash` says that they were already out of the pipe. */
static void drained(struct pass *s, struct relay_node *n, int64_t moved)
{
    (void)s;
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

/* The way out is full. A node is slow when it was so for after_ns without having emptied again. */
static void blocked(struct pass *s, struct relay_node *n)
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
static void into_emptied(struct pass *s, struct relay_node *n)
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

static int discard(struct pass *s, struct relay_node *n, int64_t amount)
{
    int64_t stashed = n->stash_len - n->stash_out, moved;
    if (stashed) {
        moved = amount < stashed ? amount : stashed;
        n->stash_out += moved;
    } else {
        moved = call_splice(n->pipe_r, NULL, s->e->null_fd, amount, 0);
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
        if (moved <= 0) {
            tell(s, n->token, RELAY_BROKEN, moved ? moved : EIO);
            return 0;
        }
    }
    drained(s, n, moved);
    return (int)(moved > 0);
}

static void ferry_hand_over(struct relay_ferry *f)
{
    uint64_t one = 1;
    int k = f->at;
    f->at ^= 1;
    __atomic_store_n(&f->turn[k], RELAY_WITH_THREAD, __ATOMIC_RELEASE);
    while (write(f->knock, &one, sizeof one) < 0 && errno == EINTR) {}
}

static int ferry_has(struct relay_ferry *f, int k)
{
    return __atomic_load_n(&f->turn[k], __ATOMIC_ACQUIRE) == RELAY_WITH_ENGINE;
}

/* A full pipe is handed over at once; one that is not, when the sweep is over and the thread is idle. */
static void ferry_flush(struct relay_ferry *f)
{
    if (ferry_has(f, f->at) && f->load[f->at] && ferry_has(f, f->at ^ 1))
        ferry_hand_over(f);
}

static int64_t give(struct relay_node *n, int to, int is_socket, int64_t amount)
{
    if (n->stash_len > n->stash_out)
        return call_write(to, is_socket, n->stash + n->stash_out, amount);
    return call_splice(n->pipe_r, NULL, to, amount, 0);
}

/* Moves at most `amount` bytes to wherever this node's bytes go: bytes moved, 0 when it cannot take any now,
 * -1 after a change of method. */
static int64_t give_to_ferry(struct pass *s, struct relay_node *n, int64_t amount)
{
    struct relay_ferry *f = n->sink->ferry;
    int64_t moved = 0;
    for (int tries = 0; tries < 2; tries++) {
        int k = f->at;
        if (__atomic_load_n(&f->error, __ATOMIC_ACQUIRE)) {
            sink_failed(s, n, f->error);
            return -1;
        }
        if (!ferry_has(f, k))
            return 0;
        moved = give(n, f->pipe_w[k], 0, amount);
        s->e->calls++;
        if (moved > 0) {
            f->load[k] += moved;
            return moved;
        }
        if (moved != -EAGAIN)
            return moved;
        if (!f->load[k]) {
            look_again(s);
            return 0;
        }
        if (!ferry_has(f, k ^ 1))   /* both away: the sink is slow */
            return 0;
        ferry_hand_over(f);
    }
    return 0;
}

static int64_t give_to_sink(struct pass *s, struct relay_node *n, int64_t amount)
{
    struct relay_end *sink = n->sink;
    int64_t moved;
    if (sink->kind == RELAY_FERRY)
        return give_to_ferry(s, n, amount);
    if (sink->fd < 0 || !sink->writable)
        return 0;
    if (sink->kind == RELAY_INSTANT && n->stash_len > n->stash_out)
        return amount;        /* /dev/null need not see what is in memory already */
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

/* How much may pass the gate now: whole quanta of the rate, so that a slow rate is not a dribble. */
static int64_t gate(struct pass *s, struct relay_node *n, int64_t amount)
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

/* Reads owed (or, where tee is done by hand too, fresh) bytes out of the pipe, to be written from memory. */
static int fill_stash(struct pass *s, struct relay_node *n, int fresh)
{
    int64_t amount = fresh ? n->held : n->next ? n->owed : n->held, moved;
    if (amount > n->stash_size)
        amount = n->stash_size;
    moved = call_read(n->pipe_r, 0, n->stash, amount);
    s->e->calls++;
    if (moved == -EAGAIN) {
        look_again(s);
        return 0;
    }
    if (moved <= 0) {
        tell(s, n->token, RELAY_BROKEN, moved ? moved : EIO);
        return 0;
    }
    n->stash_len = moved;
    n->stash_out = 0;
    n->stash_next = fresh ? 0 : moved;
    if (fresh)
        n->owed = moved;
    n->full = 0;
    return 1;
}

static int tee_by_hand(struct pass *s, struct relay_node *n)
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

static int tee_on(struct pass *s, struct relay_node *n)
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

/* A gap begins and ends between pieces of `align` bytes, counted from the stream's first byte. The piece that
 * was under way when it began is kept aside (at most align - 1 bytes) and goes out before anything else. */
static int drop(struct pass *s, struct relay_node *n, int64_t amount)
{
    struct relay_node *to = n->into;
    int64_t moved, to_border, before;
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
        if (moved == -EAGAIN) {
            look_again(s);
            return 0;
        }
        if (moved <= 0) {
            tell(s, n->token, RELAY_BROKEN, moved ? moved : EIO);
            return 0;
        }
        n->rest_have += moved;
        n->passed += moved;
        drained(s, n, moved);
        return 1;
    }
    if (to && !to->held && !refuses(to)) {
        if (n->rest_have) {           /* an empty pipe takes it whole: it is less than a page's slots */
            moved = call_write(to->pipe_w, 0, n->stash + n->stash_size, n->rest_have);
            s->e->calls++;
            if (moved == -EAGAIN) {
                look_again(s);
                return 0;
            }
            if (moved <= 0) {
                tell(s, n->token, RELAY_BROKEN, moved ? moved : EIO);
                return 0;
            }
            to->held += moved;
            memmove(n->stash + n->stash_size, n->stash + n->stash_size + moved,
                    (size_t)(n->rest_have - moved));
            n->rest_have -= moved;
            n->rest_need = n->rest_have;
            return 1;
        }
        n->rest_need = 0;
        to_border = (n->passed + n->dropped) % n->align;
        if (!to_border) {
            n->dropping = 0;
            into_emptied(s, n);
            return 1;
        }
        to_border = n->align - to_border;
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

static int move_out(struct pass *s, struct relay_node *n, int64_t amount)
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
        if (n->left)
            n->dropped += before - n->held;
        return any;
    }
    amount = gate(s, n, amount);
    if (!amount)
        return 0;
    moved = n->into ? give_to_node(s, n, amount) : give_to_sink(s, n, amount);
    if (moved == 0) {
        blocked(s, n);
        return 0;
    }
    if (moved < 0) {
        if (n->sink == NULL && !n->into)        /* the ferry failed and was told of */
            return 1;
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
    if (n->sink) {
        n->sink->moved += moved;
        n->sink->last_ns = s->e->now_ns;
    }
    drained(s, n, moved);
    if (!n->left && n->into)
        n->into->ended = 1;
    return 1;
}

/* Whether anything is still in this node's keeping. */
static int holds(const struct relay_node *n)
{
    return n->held || n->prefix_left || n->rest_have || (n->next && n->stash_next < n->stash_len);
}

static void pass_end_on(struct pass *s, struct relay_node *n)
{
    n->done = 1;
    if (n->next)
        n->next->ended = 1;
    if (n->into)
        n->into->ended = 1;
    if (n->sink)
        tell(s, n->sink->token, RELAY_SINK_DRAINED, 0);
}

static int turn(struct pass *s, struct relay_node *n)
{
    int moved = 0;
    int64_t amount;

    if (n->since_ns && n->into && !n->into->held && !n->dropping)
        into_emptied(s, n);
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

/* What the peer of a one-way sink sends is thrown away: closing with unread bytes would reset the connection
 * and destroy what is under way to it. */
static void read_and_discard(struct pass *s, struct relay_node *n)
{
    struct relay_end *sink = n->sink;
    for (int rounds = 0; rounds < 16 && sink->readable; rounds++) {
        int64_t got = call_read(sink->fd, sink->is_socket, s->e->scratch, s->e->scratch_size);
        if (got > 0) {
            sink->discarded += got;
        } else if (got == -EAGAIN) {
            sink->readable = 0;
        } else if (got == 0) {
            sink->readable = 0;
            if (!sink->peer_ended) {
                sink->peer_ended = 1;
                tell(s, sink->token, RELAY_PEER_ENDED, 0);
            }
        } else {
            sink->readable = 0;
            sink_failed(s, n, got);
            return;
        }
    }
    if (sink->readable)
        look_again(s);
}

/* ---- the whole chain ---------------------------------------------------------------------------- */

static void unlink_node(struct relay_pipeline *p, struct relay_node *gone, struct relay_node *successor)
{
    if (p->head == gone)
        p->head = successor ? successor : gone->after;
    for (struct relay_node *n = p->head; n; n = n->after) {
        if (n->next == gone)
            n->next = successor;
        if (n->into == gone)
            n->into = successor;
        if (n->after == gone)
            n->after = gone->after;
    }
    p->nodes--;
}

void relay_insert(struct relay_pipeline *p, struct relay_node *before, struct relay_node *node,
                  struct relay_node *leaf)
{
    if (p->head == before)
        p->head = node;
    else
        for (struct relay_node *n = p->head; n; n = n->after) {
            if (n->next == before)
                n->next = node;
            if (n->into == before)
                n->into = node;
            if (n->after == before) {
                n->after = node;
                break;
            }
        }
    node->next = before;
    node->into = leaf;
    node->ended = before->ended;
    node->after = leaf ? leaf : before;
    if (leaf)
        leaf->after = before;
    p->nodes += leaf ? 2 : 1;
}

/* A leaving node goes when it holds nothing; the first node of its branch goes with it. */
static void remove_leaving(struct pass *s)
{
    struct relay_node *n = s->p->head, *after;
    for (; n; n = after) {
        struct relay_node *leaf = n->into;
        after = n->after;
        if (!n->leaving || holds(n) || !n->next || (leaf && leaf->held))
            continue;
        if (leaf) {
            if (after == leaf)
                after = leaf->after;
            n->into = NULL;
            unlink_node(s->p, leaf, NULL);
        }
        if (n->ended)
            n->next->ended = 1;
        unlink_node(s->p, n, n->next);
        tell(s, n->token, RELAY_REMOVED, 0);
    }
}

static int sweep(struct pass *s)
{
    struct relay_pipeline *p = s->p;
    struct relay_node *n;
    int moved, empty = 1, open = 0;

    p->wake_ns = 0;
    if (p->retry) {           /* an answer contradicted what was known: believe nothing remembered */
        p->retry = 0;
        if (p->source)
            p->source->readable = 1;
        for (n = p->head; n; n = n->after) {
            n->full = 0;
            if (n->sink)
                n->sink->writable = 1;
        }
    }
    do {
        moved = fill_from_source(s);
        for (n = p->head; n; n = n->after)
            moved |= turn(s, n);
    } while (moved && s->read < s->e->budget);
    for (n = p->head; n; n = n->after) {
        struct relay_end *sink = n->sink;
        if (holds(n))
            empty = 0;
        if (!sink)
            continue;
        if (sink->kind == RELAY_FERRY) {
            ferry_flush(sink->ferry);
            if (__atomic_load_n(&sink->ferry->error, __ATOMIC_ACQUIRE)) {
                sink_failed(s, n, sink->ferry->error);
                continue;
            }
        } else if (sink->discard && sink->readable && sink->fd >= 0) {
            read_and_discard(s, n);
            if (!n->sink)
                continue;
        }
        if (!n->done)
            open++;
    }
    remove_leaving(s);
    if (empty && p->tell_idle && (p->source_ended || !p->source)) {
        p->tell_idle = 0;
        tell(s, p->token, RELAY_IDLE, 0);
    }
    if (!open && !p->done && !p->keep) {
        p->done = 1;
        tell(s, p->token, RELAY_DONE, 0);
    }
    return moved;
}

int relay_pump(struct relay_engine *e, struct relay_pipeline *p, struct relay_event *out, int *count, int max)
{
    struct pass s = { .e = e, .p = p, .out = out, .count = *count, .max = max };
    int more = sweep(&s);
    *count = s.count;
    return more;
}
