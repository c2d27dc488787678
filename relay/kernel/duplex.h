/* Sessions of two sockets, relayed both ways without a pipeline, and the connections that they are made of: the face of
 * duplex.c, direction.c and dial.c. It comes behind pump.h and like it has no preprocessor lines. */

enum {                       /* relay_duplex.state */
    RELAY_UNCONNECTED = 0,   /* told as RELAY_NOT_CONNECTED, or not begun */
    RELAY_CONNECTING = 1,
    RELAY_TURNING = 2,
    RELAY_CUTTING = 3,       /* one side broke: the other gets what is there, then a reset */
    RELAY_ENDED = 4,         /* told as RELAY_OVER */
    RELAY_LENT = 5           /* told as RELAY_CONNECTED: pipelines move its bytes, its descriptors stay its own */
};

/* One of the two sockets of a duplex session, and what came from it and waits for the other one to take it. It
 * begins like a relay_end: epoll gives a pointer to either. */
struct relay_side {
    uint64_t token;
    int fd;
    int kind;                /* RELAY_SIDE */
    uint8_t which;           /* 0 or 1: where it stands in its session */
    uint8_t tcp;             /* a short read means that nothing is left, unless `urgent` or `hung` */
    uint8_t readable, writable;
    uint8_t hung;            /* epoll told of an end or a failure that was not read yet */
    uint8_t urgent;          /* reads stop at urgent data: only EAGAIN means empty from here on */
    uint8_t asked;           /* EPOLLOUT is registered */
    uint8_t ended;           /* gave its end of stream, or broke: nothing more comes from it */
    uint8_t shut;            /* was told the end of the other's stream */
    uint8_t bulk;            /* reads fill whole buffers */
    uint8_t method;          /* of bulk that comes from here: RELAY_SPLICE or RELAY_COPY */
    int error;               /* errno by which it broke */
    int64_t moved;           /* bytes that came from here */
    int64_t given;           /* of these, taken by the other side's kernel */
    int64_t spliced;         /* of these, without being copied */
    char *buffer;            /* borrowed from the exchange while it holds bytes */
    int32_t at, until;       /* what waits in it */
    int32_t large;
    int32_t held;            /* bytes in the pipe; borrowed likewise */
    int pipe_r, pipe_w;
};

/* Two connected sockets, relayed both ways. Python opens and closes both descriptors. */
struct relay_duplex {
    struct relay_side sides[2];
    uint64_t token;          /* whom events go to, with `slot` as their mask */
    uint32_t slot;
    uint8_t state;
    uint8_t first;           /* 1 + the side that ended or broke first; 0: none has */
    uint8_t queued, timed;
    uint8_t lends;           /* once connected it is lent */
    uint8_t gauges;          /* its bulk may be measured */
    int64_t last_ns;         /* monotonic time of the last byte */
    int64_t connected_ns;    /* when its second side was connected; 0: it is not */
    int64_t until_ns;        /* connecting: when it is given up; cutting: when the reset is due */
    int64_t seen;            /* cutting: bytes outstanding when last looked at */
    const char *ahead;       /* goes to the second side before all else: `ahead_size` bytes, Python's until it is over */
    int32_t ahead_size, ahead_at;
    char origin[28];         /* a sockaddr of `origin_size` bytes that it connects from, perhaps not this machine's */
    int32_t origin_size;     /* 0: one of this machine's own */
    struct relay_duplex *next;
    struct relay_duplex *timed_next, *timed_prev;
};

/* What one direction of one session costs. Bulk that comes while the gauge is at nobody, or at one that has been still
 * for a second, takes it; then Python says what is measured next. */
struct relay_gauge {
    struct relay_side *side; /* whose bytes, or NULL */
    int method;              /* that side's when nothing is tried: it has it again when the gauge moves on */
    int64_t skip, size;      /* bytes that are to come before, and to be measured then */
    int64_t came;            /* bytes since it was set up, */
    int64_t gauged, cpu_ns;  /* of these, measured ones, and what they took of the engine's thread's CPU time */
    int64_t last_ns;
    int64_t first_skip, first_size;
};

/* What the duplex sessions of an engine share. Buffers and pipes are handed out last in, first out, so few are hot,
 * and are with a session only while they hold bytes. With none free bytes are looked at (MSG_PEEK), passed on and
 * taken by as much as went: nobody waits for memory that others hold. */
struct relay_exchange {
    uint64_t token;
    char *small, *large;     /* memory of both kinds, and the numbers of those that are free */
    int32_t *small_free, *large_free;
    int small_size, large_size, small_count, large_count;
    int *pipes_r, *pipes_w;  /* those that are free: empty pipes */
    int pipe_count;
    int wants_pipe;          /* 1: Python may be asked for one */
    int timed_count;
    int64_t look_ns;         /* when those that wait for a time are looked at next */
    int64_t turns;           /* sessions turned, for tests */
    struct relay_duplex *first, *last;
    struct relay_duplex *timed;
    struct relay_gauge gauge;
};

/* What relay_accept tells of a connection: its descriptor, nonblocking, and its peer's name. */
struct relay_accepted {
    int fd;
    char peer[60];
};

/* How a socket is opened that connects. `tcp`: with the options of every tcp socket of relay's, `longest_ms` 0 for none. */
struct relay_dial {
    char place[128];         /* a sockaddr of `place_size` bytes */
    int place_size;
    int family;
    int tcp;
    int unpaced;             /* reno, whatever the system's choice is */
    int idle, interval, count, longest_ms;
};

/* One of many connects: to where `dial` says, from the address `origin` where that has a size. */
struct relay_dialing {
    const struct relay_dial *dial;
    char origin[32];
    int origin_size;
    int fd;
};

/* `d` becomes a new session of the connection `fd`, unconnected so far: 0 or -errno. */
int relay_duplex_begin(struct relay_engine *e, struct relay_duplex *d, int fd, int tcp, int method, int method_back,
                       uint64_t token, uint32_t slot);
/* Its second side connects, for `timeout_ns` at most, in place of one that did not: 0 or -errno. */
int relay_duplex_dial(struct relay_engine *e, struct relay_duplex *d, const struct relay_dial *dial, int64_t timeout_ns);
/* Its second side is `fd`, which connects, or is connected; a tcp socket may be called connecting when it is not any
 * more. `fd` is the session's from here: 0 or -errno. */
int relay_duplex_adopt(struct relay_engine *e, struct relay_duplex *d, int fd, int tcp, int is_connected,
                       int64_t timeout_ns);
/* Connects `count` times, in their order; each `fd` is then a descriptor, or -errno. One that is not tcp is connected. */
void relay_dial(struct relay_dialing *those, int count);
/* It may move again: Python has put pipes or buffers there, or changed its mind. */
void relay_duplex_ready(struct relay_engine *e, struct relay_duplex *d);
/* Closes both descriptors, with resets where `reset`, takes it off every list and gives back what it borrowed: its
 * struct may be used for another one. A pipe that still holds bytes is closed, not given back. */
void relay_duplex_close(struct relay_engine *e, struct relay_duplex *d, int reset);
/* Which sides have not acknowledged all that was sent to them: 1 and 2, added. tcp only. */
int relay_duplex_outstanding(const struct relay_duplex *d);
/* Bytes that came from a side and wait in relay for the other one. */
int64_t relay_duplex_waits(const struct relay_side *side);
/* Up to `max` connections that wait at a listening socket, which become the caller's: their number, or -errno. */
int relay_accept(int fd, struct relay_accepted *out, int max);
/* Closes what relay_accept gave, with a reset. */
void relay_refuse(int fd);
