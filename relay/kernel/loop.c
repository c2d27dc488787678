/* The loop: one epoll set, a ready list, a list of those that wait for a time.
 *
 * Facts (man 7 epoll): edge-triggered registration tells of changes only, so a pipeline that stopped by its
 * budget stays on the ready list, since no new edge will come for what is already there. The events of one
 * wait are all turned into flags before any pipeline is swept and before Python runs, so a struct that
 * Python frees afterwards is named by no pending event. epoll_pwait2 (Linux 5.11) waits for nanoseconds;
 * where it is missing or forbidden, milliseconds are rounded up. */
#include "calls.h"

#include <string.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <time.h>

#define BATCH 256
#define LONGEST 3600000000000LL

static int64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000LL + now.tv_nsec;
}

static int control(struct relay_engine *e, int operation, struct relay_end *end, uint32_t events)
{
    struct epoll_event registration;
    memset(&registration, 0, sizeof registration);
    registration.events = events;
    if (end->kind != RELAY_WATCH && end->kind != RELAY_ANSWER)
        registration.events |= EPOLLET;
    registration.data.ptr = end;
    return epoll_ctl(e->epoll, operation, end->fd, &registration) < 0 ? -errno : 0;
}

int relay_watch(struct relay_engine *e, struct relay_end *end, uint32_t events)
{
    return control(e, EPOLL_CTL_ADD, end, events);
}

int relay_rewatch(struct relay_engine *e, struct relay_end *end, uint32_t events)
{
    return control(e, EPOLL_CTL_MOD, end, events);
}

int relay_unwatch(struct relay_engine *e, struct relay_end *end)
{
    return control(e, EPOLL_CTL_DEL, end, 0);
}

void relay_ready(struct relay_engine *e, struct relay_pipeline *p)
{
    if (p->queued || p->forgotten)
        return;
    p->queued = 1;
    p->ready_next = NULL;
    if (e->ready_last)
        e->ready_last->ready_next = p;
    else
        e->ready_first = p;
    e->ready_last = p;
}

static struct relay_pipeline *pop_ready(struct relay_engine *e)
{
    struct relay_pipeline *p = e->ready_first;
    e->ready_first = p->ready_next;
    if (!e->ready_first)
        e->ready_last = NULL;
    p->ready_next = NULL;
    p->queued = 0;
    return p;
}

static void set_timed(struct relay_engine *e, struct relay_pipeline *p)
{
    if (!p->wake_ns == !p->timed)
        return;
    if (p->wake_ns) {
        p->timed = 1;
        p->timed_prev = NULL;
        p->timed_next = e->timed;
        if (e->timed)
            e->timed->timed_prev = p;
        e->timed = p;
        return;
    }
    p->timed = 0;
    if (p->timed_prev)
        p->timed_prev->timed_next = p->timed_next;
    else
        e->timed = p->timed_next;
    if (p->timed_next)
        p->timed_next->timed_prev = p->timed_prev;
}

void relay_forget(struct relay_engine *e, struct relay_pipeline *p)
{
    p->forgotten = 1;
    p->wake_ns = 0;
    set_timed(e, p);
    if (!p->queued)
        return;
    struct relay_pipeline *last = NULL;
    for (struct relay_pipeline **at = &e->ready_first; *at;) {
        if (*at == p) {
            *at = p->ready_next;
        } else {
            last = *at;
            at = &(*at)->ready_next;
        }
    }
    e->ready_last = last;
    p->queued = 0;
    p->ready_next = NULL;
}

/* How long to wait: nanoseconds, -1 for ever. */
static int64_t wait_ns(struct relay_engine *e, int64_t timeout_ns)
{
    int64_t now = clock_ns(), wait = timeout_ns;
    if (e->ready_first || (e->exchange && e->exchange->first))
        return 0;
    if (e->exchange && e->exchange->timed) {
        int64_t until = e->exchange->look_ns > now ? e->exchange->look_ns - now : 0;
        if (wait < 0 || until < wait)
            wait = until;
    }
    for (struct relay_pipeline *p = e->timed; p; p = p->timed_next) {
        int64_t until = p->wake_ns > now ? p->wake_ns - now : 0;
        if (wait < 0 || until < wait)
            wait = until;
    }
    return wait < 0 ? -1 : wait > LONGEST ? LONGEST : wait;
}

static int wait_for(struct relay_engine *e, struct epoll_event *got, int room, int64_t wait)
{
    if (wait > 0 && !e->coarse) {
        struct timespec time = { .tv_sec = wait / 1000000000LL, .tv_nsec = wait % 1000000000LL };
        long n = syscall(SYS_epoll_pwait2, e->epoll, got, room, &time, NULL, 0);
        if (n >= 0 || !(errno == ENOSYS || errno == EPERM))
            return (int)n;
        e->coarse = 1;
    }
    return epoll_wait(e->epoll, got, room, (int)(wait < 0 ? -1 : (wait + 999999) / 1000000));
}

static void note(struct relay_engine *e, struct relay_end *end, uint32_t mask)
{
    if (end->kind == RELAY_ANSWER) {
        uint64_t count;
        while (read(end->fd, &count, sizeof count) < 0 && errno == EINTR) {}
    } else {
        if (mask & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
            end->readable = 1;
        if (mask & (EPOLLOUT | EPOLLHUP | EPOLLERR))
            end->writable = 1;
    }
    if (end->reads)
        relay_ready(e, end->reads);
    if (end->writes)
        relay_ready(e, end->writes);
    /* a twin that may be written to anyway waits for nothing else */
    if (end->twin && (!end->twin->writable || mask & (EPOLLHUP | EPOLLERR)))
        note(e, end->twin, mask);
}

int relay_poll(struct relay_engine *e, int64_t timeout_ns, struct relay_event *out, int max)
{
    struct epoll_event got[BATCH];
    struct relay_pipeline *p, *next, *last;
    int count = 0, room = max < BATCH ? max : BATCH;
    int n = wait_for(e, got, room, wait_ns(e, timeout_ns));
    if (n < 0)
        return errno == EINTR ? 0 : -errno;
    e->wakeups++;
    e->now_ns = clock_ns();
    for (int i = 0; i < n; i++) {
        struct relay_end *end = got[i].data.ptr;
        if (end->kind == RELAY_SIDE) {
            duplex_note(e, got[i].data.ptr, got[i].events);
            continue;
        }
        if (end->kind != RELAY_WATCH)
            note(e, end, got[i].events);
        if (end->kind != RELAY_WATCH && !(end->twin && got[i].events & EPOLLERR))
            continue;
        out[count].token = end->token;
        out[count].what = RELAY_WATCHED;
        out[count].error = 0;
        out[count].mask = got[i].events;
        count++;
    }
    for (p = e->timed; p; p = next) {
        next = p->timed_next;
        if (p->wake_ns <= e->now_ns) {
            p->wake_ns = 0;
            set_timed(e, p);
            relay_ready(e, p);
        }
    }
    last = e->ready_last;
    for (int more = 1; more && e->ready_first;) {
        p = e->ready_first;
        if (max - count < 4 * p->nodes + 16)
            break;
        more = p != last;
        pop_ready(e);
        if (relay_pump(e, p, out, &count, max))
            relay_ready(e, p);
        set_timed(e, p);
        e->now_ns = clock_ns();
    }
    if (e->exchange)
        duplex_turn(e, out, &count, max);
    return count;
}

int relay_sweep(struct relay_engine *e, struct relay_pipeline *p, struct relay_event *out, int max)
{
    int count = 0;
    e->now_ns = clock_ns();
    if (relay_pump(e, p, out, &count, max))
        relay_ready(e, p);
    set_timed(e, p);
    return count;
}
