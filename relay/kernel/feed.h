/* The load of `relay bench`: what feeds the sources and reads from the sinks that it measures. Each loop runs on
 * a thread of its own without the GIL and ends when its peer does, or when it is told to. Like pump.h this file
 * has no preprocessor lines. */

enum {                       /* relay_drain.kinds: how bytes are thrown away for the least there is */
    RELAY_DRAIN_PIPE = 1,    /* splice to /dev/null: pages are let go unseen */
    RELAY_DRAIN_TCP = 2,     /* recv with MSG_TRUNC: dropped in the kernel */
    RELAY_DRAIN_UNIX = 3     /* read into memory: unix sockets drop nothing */
};

/* One producer. `fd` is blocking; it stays the caller's to close. */
struct relay_feed {
    int fd;
    const char *memory;      /* given by write, `size` bytes a call; NULL: spliced from `file` */
    int file;                /* of file_size bytes, read over and over by reference; fd is a pipe then */
    int64_t file_size;
    int64_t size;            /* bytes a call */
    int stop;                /* set from any thread: no further call is begun */
    int64_t moved;           /* bytes given */
};

/* `count` consumers in one loop. The descriptors are nonblocking and stay the caller's to close. */
struct relay_drain {
    int *fds;
    int *kinds;
    int64_t *got;            /* bytes each has thrown away */
    int count;
    int null_fd;
    int stop;                /* an eventfd: readable, the loop ends */
    char *memory;
    int64_t memory_size;
};

/* Feeds until it is stopped: 0, or -errno when nobody takes the bytes any more. */
int relay_feed_run(struct relay_feed *f);
/* Reads until every stream has ended, or it is stopped: 0, or -errno of the first that broke. */
int relay_drain_run(struct relay_drain *d);
