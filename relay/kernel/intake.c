/* Into a node: what is put in front of a stream, and the head from the source. See pass.h. */
#include "pass.h"

#include <string.h>
#include <sys/mman.h>

#define MAPPED (16 << 20)       /* bytes of a mapped file that are entered at once, and one piece */

/* The prefix goes in before anything else: feeders wait while it lasts. */
int fill_prefix(struct pass *s, struct relay_node *n)
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

int source_took(struct pass *s, int64_t moved)
{
    struct relay_end *source = s->p->source;
    source->moved += moved;
    source->last_ns = s->e->now_ns;
    s->p->fed += moved;
    s->read += moved;
    if (source->left > 0)
        source->left -= moved;
    leave_alone(source, &source->readable, POLLIN);
    return 1;
}

static void source_empty(struct pass *s, struct relay_end *source)
{
    if (source->kind == RELAY_INSTANT || says_ready(source->fd, POLLIN))
        look_again(s);
    source->readable = 0;
}

/* Bytes read from the source into memory; 0 when there are none now, or no more will come. */
int64_t read_source(struct pass *s, char *to, int64_t most)
{
    struct relay_end *source = s->p->source;
    int64_t moved;
    if (source->left >= 0 && most > source->left)
        most = source->left;
    if (source->memory && source->fd < 0) {   /* a mapped file is read instead: it may have been cut short */
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
        return 0;
    }
    if (source->offset >= 0)
        source->offset += moved;
    return moved;
}

/* A head with nothing to tee and a sink that is written by hand needs no pipe between: the source is read
 * into the stash. Otherwise a copying source is read only into an empty pipe, where it surely fits. */
static int fill_by_hand(struct pass *s, struct relay_node *head)
{
    int direct = head->out_copies && head->stash && !head->next && head->stash_out == head->stash_len;
    char *to = direct ? head->stash : s->e->scratch;
    int64_t most = direct ? head->stash_size : s->e->scratch_size, moved;
    if (head->held)
        return 0;
    if (!direct && most > head->capacity)
        most = head->capacity;
    moved = read_source(s, to, most);
    if (moved <= 0)
        return s->p->source_ended;
    if (direct) {
        head->stash_len = moved;
        head->stash_out = 0;
        head->stash_next = moved;
    } else {
        int64_t written = 0;
        int refused = 0;
        while (written < moved) {
            int64_t w = call_write(head->pipe_w, 0, to + written, moved - written);
            s->e->calls++;
            if (w == -EAGAIN && ++refused < 100)    /* an empty pipe takes its capacity: a passing fault */
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

/* Out of memory that is written again once all of it is gone: straight to a socket that nothing waits for, else into the
 * pipe as far as there is room. A write to a socket costs less than one to a pipe, which takes page by page. */
static int64_t fill_from_memory(struct pass *s, struct relay_node *head, int64_t most)
{
    struct relay_end *source = s->p->source, *sink = head->sink;
    const char *from = source->memory + source->offset;
    int64_t moved = -EAGAIN;
    int straight = sink && !sink->failed && sink->is_socket && sink->fd >= 0 && sink->writable && !head->next
        && !head->into && !head->ring && !head->held && !head->rate && head->left < 0 && !head->skip && !head->dropping
        && !head->prefix_left;

    if (straight) {
        moved = call_write(sink->fd, 1, from, most);
        if (moved > 0) {
            sink->method = RELAY_COPY;
            sink_took(s, sink, moved);
            head->passed += moved;
            drained(s, head, 0);        /* it is not slow, and holds nothing */
        } else if (moved == -EAGAIN) {
            if (says_ready(sink->fd, POLLOUT))
                look_again(s);
            sink->writable = 0;
        }                               /* any other answer is met by whoever empties the pipe */
        s->e->calls++;
    }
    if (moved <= 0) {
        moved = call_write(head->pipe_w, 0, from, most);
        if (moved > 0)
            head->held += moved;
    }
    if (moved > 0)
        source->offset += moved;
    return moved;
}

/* Whether the source may be asked for bytes now; -1 when it was found at its end. */
int source_gives(struct pass *s)
{
    struct relay_pipeline *p = s->p;
    struct relay_end *source = p->source;
    if (!source || p->source_ended || p->paused || p->still || p->head->ended || refuses(p->head))
        return 0;
    if (source->left == 0 && source->waits) {
        if (source->readable) {
            source->readable = 0;
            tell(s, p->token, RELAY_SOURCE_DRY, 0);
        }
        return 0;
    }
    if (source->left == 0) {
        source_over(s, RELAY_SOURCE_ENDED, 0);
        return -1;
    }
    return source->readable && (source->fd >= 0 || source->memory);
}

/* What is lent of a mapped file stays entered in this process's page tables, and counts as its memory, until it is told
 * that it needs it no more; whoever has pages by reference keeps them. */
static void unmap_behind(const struct relay_end *source, int64_t moved)
{
    int64_t from = source->offset - source->offset % MAPPED, until = source->offset + moved;
    until -= until % MAPPED;
    if (until > from)
        madvise(source->memory + from, (size_t)(until - from), MADV_DONTNEED);
}

int fill_from_source(struct pass *s)
{
    struct relay_pipeline *p = s->p;
    struct relay_node *head = p->head;
    struct relay_end *source = p->source;
    int64_t most = most_read(p), moved;
    loff_t offset;
    int gives = source_gives(s), from_memory;

    if (gives <= 0)
        return gives < 0;
    if (source->left > 0 && most > source->left)
        most = source->left;
    from_memory = source->memory && source->fd < 0 && !(head->out_copies && head->stash && !head->next);
    if (source->method == RELAY_COPY && !from_memory)
        return goes_straight(head) ? fill_ferry(s, head) : fill_by_hand(s, head);
    if (source->method == RELAY_SENDFILE) {
        struct relay_end *sink = head->sink;
        if (!sink || head->next) {      /* its sink failed, or is no longer the only one */
            source->method = RELAY_SPLICE;
            return 1;
        }
        if (head->held)
            return 0;
        if (!sink->writable || sink->fd < 0) {
            blocked(s, head);
            return 0;
        }
        offset = source->offset;
        moved = call_sendfile(sink->fd, source->fd, source->offset < 0 ? NULL : &offset, most);
        s->e->calls++;
        if (moved > 0) {
            if (source->offset >= 0)
                source->offset = offset;
            sink_took(s, sink, moved);
            head->passed += moved;
            drained(s, head, 0);      /* it is not slow, and holds nothing */
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
            blocked(s, head);
            return 0;
        }
        /* which side failed? a pipe between them tells */
        source->method = RELAY_SPLICE;
        return 1;
    }
    if (source->method == RELAY_COPY) {
        moved = fill_from_memory(s, head, most);
    } else if (source->method == RELAY_VMSPLICE) {
        moved = call_lend(head->pipe_w, source->memory + source->offset, most);
        if (moved > 0) {
            if (source->fd >= 0)
                unmap_behind(source, moved);
            source->offset += moved;
        }
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
        if (source->method != RELAY_COPY) {
            if (p->looks && !head->held)
                look_at_piece(s, head, moved);
            head->held += moved;
        }
        return source_took(s, moved);
    }
    if (moved == 0) {
        source_over(s, RELAY_SOURCE_ENDED, 0);
        return 1;
    }
    if (moved == -EAGAIN) {
        if (head->held)
            head->full = 1;
        else if (!source->is_socket)
            source_empty(s, source);
        else if (says_ready(source->fd, POLLIN))
            return fill_by_hand(s, head);   /* tcp does not splice past urgent data, recv does */
        else
            source->readable = 0;
        return 0;
    }
    if (source->method != RELAY_COPY && not_this_way(moved)) {
        source->method = RELAY_COPY;
        tell(s, p->token, RELAY_SOURCE_COPIES, moved);
        return 1;
    }
    source_over(s, RELAY_SOURCE_FAILED, moved);
    return 1;
}
