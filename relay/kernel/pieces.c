/* How large the pieces are that a stream comes in, looked at as its first ones pass.
 *
 * Facts (fs/splice.c link_pipe, fs/pipe.c; man 2 tee):
 * - A message that is spliced takes a slot of the pipe, or several, never a part of one: of 512 B each, a pipe of
 *   256 slots is full with 128 KiB, and every tee and every splice out of it works slot by slot.
 * - FIONREAD tells the bytes in a pipe; nothing tells in how many slots they are.
 * - tee takes slots whole until the other pipe is full. Into a pipe of one slot it takes exactly the first, and says
 *   how many bytes that is. */
#include "pass.h"

#define SLOT 4096               /* F_SETPIPE_SZ rounds it up to a page: a pipe of one slot */
#define ENOUGH (1 << 20)        /* bytes that tell as much as many small pieces */

static int64_t first_slot(const struct relay_node *n, int64_t filled)
{
    int ends[2];
    int64_t size = -1;
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK))
        return -1;
    if (fcntl(ends[1], F_SETPIPE_SZ, SLOT) >= 0)
        size = call_tee(n->pipe_r, ends[1], filled);
    close(ends[0]);
    close(ends[1]);
    return size;
}

/* The head was empty, and `filled` bytes came from the source. */
void look_at_piece(struct pass *s, const struct relay_node *head, int64_t filled)
{
    struct relay_pipeline *p = s->p;
    int64_t size = first_slot(head, filled);
    s->e->calls++;
    if (size <= 0) {            /* no descriptor, no tee: then nothing is known */
        p->looks = 0;
        return;
    }
    if (!p->looked)
        p->looked_ns = s->e->now_ns;
    p->looked++;
    p->pieces += size;
    p->fills += filled;
    if (--p->looks && p->fills < ENOUGH)
        return;
    p->looks = 0;
    p->looked_ns = s->e->now_ns - p->looked_ns;
    tell(s, p->token, RELAY_PIECES, 0);
}
