/* What the files of duplex sessions share.
 *
 *     direction.c  one way: from one side to the other, and the memory and pipes borrowed for it
 *     duplex.c     both ways: a session's connect, its turn, its ends, its close */
#ifndef RELAY_DIRECTION_H
#define RELAY_DIRECTION_H

#include "calls.h"

/* Bytes that came from a side and wait in relay for the other one. */
static inline int64_t waits(const struct relay_side *s) { return s->until - s->at + s->held; }

/* direction.c: from one side to the other, as far as it goes; whether the budget stopped it. */
int direction_pass(struct relay_engine *e, struct relay_duplex *d, struct relay_side *from, struct relay_side *to);
/* Tells epoll of a side, with EPOLLOUT where it `asked`: 0 or -errno. */
int side_register(struct relay_engine *e, int operation, struct relay_side *side);
/* It took less than it was offered: epoll tells when there is room again. */
void side_filled(struct relay_engine *e, struct relay_side *to);
/* Its connection is broken. What it sent before may still be there to be read: that ends of itself. */
void side_broke(struct relay_engine *e, struct relay_duplex *d, struct relay_side *side, int64_t error);
/* Bytes that a reset would destroy on their way to that side. */
int64_t side_outstanding(const struct relay_side *to);
/* To a broken side nothing can be given: what comes for it is not even read, what waits is gone. */
void side_lose(struct relay_exchange *x, struct relay_side *from);
/* What it borrowed is given back; a pipe that still holds bytes is emptied. */
void side_release(struct relay_engine *e, struct relay_side *side);

/* duplex.c: one side broke; the other one gets what is there, then a reset. */
void duplex_cut(struct relay_engine *e, struct relay_duplex *d);

#endif
