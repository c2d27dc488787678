/* The C core's face. cffi reads this file as its cdef and the compiler as a header, so it has no
 * preprocessor lines. Python allocates every struct and owns every descriptor; C borrows
 * them for as long as the struct that names them is wired to an engine. C allocates nothing, keeps no
 * globals, calls nobody back and logs nothing: what Python must decide is returned as an event.
 *
 *            tee              tee
 *        +---------+      +---------+
 *        |         v      |         v
 * source -> node 0 |  -> node 1 |  -> ... node n       every node is one kernel pipe
 *              | splice        | splice        | splice
 *            sink, or the first node of a branch
 *
 * A node moves bytes so: if nothing is `owed`, tee what it holds into `next`, which makes that owed; then
 * move exactly the owed bytes out. tee(2) always starts at the head of a pipe, so it never runs while
 * anything is owed. A node without `next` owes all it holds. */

enum {                       /* relay_end.kind: how a descriptor tells that it is ready */
    RELAY_POLLED = 1,        /* epoll tells: sockets, fifos, terminals */
    RELAY_INSTANT = 2,       /* never waits: /dev/null; a file being read; memory */
    RELAY_FERRY = 3,         /* blocks, so a thread carries whole pipes to it: files, devices, hashes */
    RELAY_WATCH = 4,         /* no part of a pipeline: Python is told of each event */
    RELAY_ANSWER = 5,        /* the eventfd by which a ferry's thread says that a pipe is back */
    RELAY_SIDE = 6           /* one of the two sockets of a duplex session: a relay_side (duplex.h), not a relay_end */
};

enum {                       /* relay_end.method */
    RELAY_SPLICE = 1,
    RELAY_COPY = 2,
    RELAY_SENDFILE = 3,      /* a source file straight to the only sink, without a pipe of ours */
    RELAY_VMSPLICE = 4       /* a source in memory, lent page by page */
};

enum {                       /* relay_event.what */
    RELAY_WATCHED = 1,       /* end: epoll said `mask`; one with a twin: an error may stand behind bytes nobody takes */
    RELAY_SOURCE_ENDED = 2,  /* pipeline: the source came to its end */
    RELAY_SOURCE_FAILED = 3, /* pipeline: `error` */
    RELAY_SINK_DRAINED = 4,  /* end: it was given all that it will get */
    RELAY_SINK_FAILED = 5,   /* end: `error`; what was meant for it is discarded from here on */
    RELAY_PEER_ENDED = 6,    /* end: the peer of a one-way sink shut its write side, or hung up after that */
    RELAY_WANTS_COPY = 7,    /* node: the kernel refuses zero-copy here (`error`); give it a stash */
    RELAY_SOURCE_COPIES = 8, /* pipeline: the same for the source; it goes on by itself */
    RELAY_SLOW = 9,          /* node or reader: its way out was full for `after_ns` */
    RELAY_CAUGHT_UP = 10,    /* node or reader: emptied again */
    RELAY_IDLE = 11,         /* pipeline: nothing is under way between the source and the sinks */
    RELAY_DONE = 12,         /* pipeline: every sink has ended or failed */
    RELAY_BROKEN = 13,       /* node: moving bytes between pipes failed with `error` */
    RELAY_SOURCE_DRY = 14,   /* pipeline: the source gave all that is there, and more may come */
    RELAY_SINK_BUSY = 15,    /* end: bytes went out after Python had set `rouse` */
    RELAY_NOT_CONNECTED = 16, /* session `mask`: connecting its second side failed with `error` */
    RELAY_OVER = 17,         /* session `mask`: nothing is left to be moved; its descriptors are Python's to close */
    RELAY_WANTS_PIPE = 18,   /* exchange: bulk would go through a pipe, and none is free */
    RELAY_STILL = 19,        /* pipeline: `still` was asked for, and nothing is under way */
    RELAY_GAUGED = 20,       /* pipeline: `gauge_until` bytes have come; session `mask`: the gauge's, of side `error` */
    RELAY_CONNECTED = 21,    /* session `mask`, which lends: both its sides are connected, pipelines may have them */
    RELAY_PIECES = 22        /* pipeline: its first pieces were looked at */
};

enum { RELAY_WITH_ENGINE = 0, RELAY_WITH_THREAD = 1 };

struct relay_event {
    uint64_t token;
    int32_t what;
    int32_t error;
    uint32_t mask;
};

/* One blocking end, one thread, two loads that change hands whole. A load is what a pipe holds, or a span of
 * memory. A pipe is locked while a splice on it blocks, so the engine never touches what the thread has. They
 * alternate: 0, 1, 0, 1. */
struct relay_ferry {
    int fd;                  /* the blocking end */
    int method;              /* RELAY_SPLICE or RELAY_COPY, through buffer; a span is written as it lies */
    int pipe_r[2], pipe_w[2];
    char *span[2];           /* where a load lies in memory; NULL: it is in the pipe */
    int64_t load[2];         /* bytes in each; written by whoever has it */
    int turn[2];             /* RELAY_WITH_...; the hand-over is the release store */
    int at;                  /* the load the engine fills */
    int away;                /* the load the thread waits for next */
    int knock;               /* eventfd, engine to thread */
    int answer;              /* eventfd, thread to engine: a load is back, and the engine had asked */
    int asked;
    int refused;             /* engine: both were away when there were bytes */
    int ending;              /* engine: nothing more will come */
    int look;                /* engine: relay_ferry_run is to return, there is something to see to */
    int error;               /* thread: errno that stopped it */
    char *memory;            /* room for two loads, read into straight from the source; NULL: by pipes alone */
    int64_t room;            /* bytes of one of them */
    int64_t most;            /* up to here the present one is filled: it ends at a multiple of room in the stream */
    int64_t since_ns;        /* engine: when its first byte came */
    int rush;                /* engine: the last load was a large one, so a small one waits for more */
    char *buffer;
    int64_t buffer_size;
    int64_t moved;           /* bytes that reached fd */
    int64_t ahead;           /* blocks are reserved so many bytes ahead of what is written; 0: they are not */
    int64_t reserved;        /* thread: the offset in the file up to which they are */
    int64_t calls;           /* thread: system calls that relay_ferry_run made for payload */
    int64_t costs[2];        /* thread: CPU time of large writes and of small ones, as far as they were looked at now, */
    int64_t sizes[2];        /* and of how many bytes */
    int small;               /* thread: small ones are cheaper */
    int seen, again;         /* thread: loads since it began to look, and after how many it begins anew */
    /* what the thread takes, for a pipeline that is measured: loads come back after the bytes were counted, so each
     * says which sample it is of */
    int tag[2];              /* engine: the sample of each load, 0: of none */
    int64_t sizes_of[2];     /* engine: bytes of each when it was handed over */
    int64_t took_ns[2];      /* thread: its CPU time for each that has a tag, waking up included */
    int64_t clock_ns;        /* thread: its CPU clock when the load before, which had one, went back; 0: it had none */
    int sample;              /* engine: of these were the last tagged loads to come back: */
    int64_t weighed, weighed_ns; /* their bytes, and their CPU time */
};

/* One descriptor at the edge of a pipeline: where bytes enter or leave. */
struct relay_end {
    uint64_t token;
    int fd;                  /* -1: not open (yet); nothing is tried */
    int kind;
    int method;
    int is_socket;           /* recv and send with MSG_DONTWAIT instead of read and write */
    int is_pipe;             /* a pipe of others: see leave_alone in pass.h */
    int readable, writable;  /* edges seen and not yet contradicted by EAGAIN */
    int discard;             /* a one-way sink: what its peer sends is read and thrown away */
    int peer_ended;          /* 1: its stream is over; 2: and epoll has hung up since */
    int failed;
    int64_t moved;           /* payload bytes: in for a source, out for a sink */
    int64_t discarded;
    int64_t last_ns;         /* monotonic time of the last byte */
    int64_t offset;          /* of a file or memory being read; -1: the descriptor's own */
    int64_t left;            /* bytes it may still give; -1: no bound */
    int waits;               /* with `left` at 0 it is dry, not ended: whoever fills it sets readable again */
    char *memory;            /* RELAY_VMSPLICE: what is lent */
    int64_t *acknowledged;   /* a sink fed from a log: kept at base + moved - what SIOCOUTQ says is under way */
    int64_t base;
    int queues;              /* SIOCOUTQ counts unacknowledged bytes here (tcp) */
    int rouse;               /* 1: tell once, as RELAY_SINK_BUSY, when bytes go out here */
    int mark;                /* a source's SO_RCVLOWAT while it is raised: fewer bytes wake nobody; 0: it is not */
    struct relay_ferry *ferry;
    struct relay_pipeline *reads, *writes;   /* whom its readiness wakes */
    struct relay_end *twin;  /* another struct for the same descriptor, which is not registered itself and hears
                                what this one does: a connection that is one pipeline's source and another's sink */
};

/* One who reads a ring: a subscriber of a broadcast, or (`stays`) the place of one of a pipeline's sinks. */
struct relay_reader {
    uint64_t token;
    struct relay_end *sink;  /* of a place: NULL when there is none, and what comes is dropped */
    struct relay_reader *after;
    int64_t at;              /* position of the next byte it gets */
    int64_t dropped;         /* bytes it was not given by policy */
    int64_t align;           /* its gaps start and end at multiples of it */
    int64_t after_ns;        /* how long it may be full before it is slow; 0: never judged */
    int64_t since_ns;        /* full since, 0: is not */
    int64_t blocked_ns;      /* for how long in all */
    int slow;
    int dropping;            /* in a gap that began at `at` */
    int done;
    char *rest;              /* of the piece that was under way when the gap began */
    int64_t rest_left;
    int stays;
    int hold;                /* as a node's: a failed sink will be replaced */
    int64_t apart_ns;        /* as a node's */
    /* a sink behind a thread: the thread writes out of the ring, a span at a time, and `at` is what it was handed */
    struct relay_ferry *ferry;
    int64_t ends[2];         /* where the span of each load ends while the thread has it, else 0 */
    int64_t kept;            /* while it has any: it may still read from here on */
};

/* Where the last streams began, of a row of streams that take turns. A border is a multiple of `align` counted from the
 * first byte of the stream it is in; where a new stream begins there is a border, too. */
struct relay_turns {
    int64_t origins[8];
    int count;               /* streams that began; none is known: the first began at 0 */
};

/* Memory that many read, each at its own position (ring.c): the end of a chain, or in place of all of it. */
struct relay_ring {
    char *memory;            /* NULL: nobody reads and nothing is kept, bytes pass by */
    int64_t size;            /* at least 8 * align of each reader */
    int64_t full;            /* bytes behind at which a reader is full: at most 7 / 8 of the size */
    int64_t keep;            /* bytes before the present ones that a newcomer gets */
    int64_t position;        /* bytes that ever came */
    int64_t offered;         /* up to here they are given out; what is behind is held back for larger sends */
    int64_t base;            /* the byte at position x lies at (x - base) % size */
    int64_t start;           /* what came before it is not in memory */
    int64_t oldest;          /* no reader that holds is behind it */
    struct relay_turns turns;
    int ended;
    int tight;               /* there was no room when bytes were to come */
    int count;
    struct relay_reader *readers;
    /* holding back (scatter.c) */
    int64_t batch;           /* no less is given out while more is coming; 0: nothing is held back */
    int64_t hold_ns;         /* but for no longer than this */
    int64_t held_ns;         /* since when, 0: nothing is */
    int64_t quick;           /* bytes in hold_ns above which a stream is a rush, */
    int64_t least;           /* once it was one for so many bytes */
    int64_t need;            /* or for so many, after holding back was in vain */
    int64_t rush;            /* bytes for which it is one now */
    int64_t window_ns, window; /* bytes that came since then */
};

struct relay_node {
    uint64_t token;
    struct relay_node *after;  /* sweep order: a node comes before all that it fills */
    struct relay_node *next;   /* teed into */
    struct relay_node *into;   /* moved into: the following stage, or the head of a branch */
    int past;                  /* `into` is but the backlog of its sink: bytes go past it while it is empty */
    int64_t stuck_ns;          /* since when that sink refused them, 0: does not */
    struct relay_end *sink;    /* or moved out to this end; with neither, discarded */
    struct relay_ring *ring;   /* beside a sink that only counts: the bytes go into the ring */
    int pipe_r, pipe_w;
    int64_t capacity;          /* bytes granted for the pipe */
    int64_t held;              /* bytes in the pipe and the stash: fed - drained */
    int64_t owed;              /* of these, already given to next and still to go out */
    int64_t passed;            /* bytes that went out */
    int64_t dropped;           /* bytes discarded by policy, or because the sink is gone */
    int full;                  /* filling it met EAGAIN, nothing was drained since */
    int ended;                 /* nothing more will come in */
    int done;                  /* its end was passed on */
    int hold;                  /* a failed sink will be replaced: keep what is meant for it */
    int64_t apart_ns;          /* of a gate: a turn's end waits for its branch no longer once its sinks took nothing for
                                  so long; 0: waits */
    struct relay_node *apart;  /* the outermost such gate whose branch it is in; NULL: none */
    /* gate */
    int64_t rate;              /* bytes a second, 0: none */
    int64_t burst;             /* most tokens */
    double tokens;
    int64_t stamp_ns;
    int64_t skip;              /* bytes still to be discarded first */
    int64_t left;              /* bytes that may still pass, -1: no bound */
    int cut;                   /* with `left` 0: what comes is dropped by policy, not by a limit */
    /* bytes put in front of what comes in: lent, never written again */
    char *prefix;
    int64_t prefix_left;
    /* a slow way out */
    int64_t after_ns;          /* 0: never judged */
    int64_t since_ns;          /* full since, 0: is not */
    int64_t blocked_ns;        /* for how long in all */
    int slow;
    int dropping;              /* discard while slow; gaps start and end at multiples of align */
    int64_t align;
    int64_t rest_need, rest_have; /* the piece that was under way when the gap began, kept in stash */
    struct relay_turns turns;  /* positions are passed + dropped */
    /* crossing by hand */
    int tee_copies, out_copies;
    char *stash;
    int64_t stash_size, stash_len, stash_next, stash_out;
};

struct relay_pipeline {
    uint64_t token;
    struct relay_end *source;
    struct relay_node *head;
    int nodes;
    int source_ended;
    int keep;                  /* the source's end is not the stream's: connections take turns */
    int tell_idle;
    int64_t idle_ns;           /* since when all but what is apart is empty */
    int done;
    int paused;                /* 1: the source is not read */
    int still;                 /* 1: nor is it now, and RELAY_STILL is told once nothing is under way; then 2 */
    struct relay_ring *ring;   /* scatter: the source is read into it and the sinks read it; the nodes stand empty */
    int64_t fed;               /* bytes that entered the head, or the ring */
    int64_t gauge_until;       /* RELAY_GAUGED is told once fed is there; 0: nothing is measured */
    int64_t gauge_from;        /* from there on sweeps of this pipeline are measured: */
    int64_t gauged, cpu_ns;    /* the bytes they read, and what they took of the engine's thread's CPU time; once told,
                                  the time of the threads that wrote those bytes to files is in it, too */
    int sample;                /* its number: not 0 while anything is measured */
    int brief;                 /* a short one, of a dear way: reads and sweeps are short, so that little goes beyond it */
    int sweeps;                /* that were measured for it */
    unsigned chance;           /* which of many small ones are */
    int looks;                 /* fills of an empty head still to be looked at, or fewer where they are large; then */
    int looked;                /* so many were, in looked_ns, */
    int64_t pieces, fills;     /* and these are their first slots, and all that came in them: bytes */
    int64_t looked_ns;         /* RELAY_PIECES tells of it; it does not where that cannot be found out */
    /* the engine's */
    int queued, timed, retry;
    int forgotten;             /* it may be freed at any time: it goes on no list any more */
    int64_t wake_ns;
    struct relay_pipeline *ready_next;
    struct relay_pipeline *timed_next, *timed_prev;
};

struct relay_engine {
    int epoll;
    int null_fd;
    char *scratch;
    int64_t scratch_size;
    int64_t budget;            /* bytes a pipeline may read before another has its turn */
    int64_t now_ns;
    int64_t calls;             /* system calls made for payload */
    int64_t wakeups;
    int coarse;                /* the kernel waits for whole milliseconds only */
    struct relay_pipeline *ready_first, *ready_last;
    struct relay_pipeline *timed;
    struct relay_exchange *exchange;   /* duplex.h; NULL: no duplex session was ever here */
};

/* Registers end->fd edge-triggered (RELAY_WATCH and RELAY_ANSWER level-triggered): 0 or -errno. */
int relay_watch(struct relay_engine *e, struct relay_end *end, uint32_t events);
int relay_rewatch(struct relay_engine *e, struct relay_end *end, uint32_t events);
int relay_unwatch(struct relay_engine *e, struct relay_end *end);
/* Puts a pipeline on the ready list; relay_forget takes it off every list of the engine. */
void relay_ready(struct relay_engine *e, struct relay_pipeline *p);
void relay_forget(struct relay_engine *e, struct relay_pipeline *p);
/* Waits at most timeout_ns (-1: for ever), pumps what is ready, returns the number of events or -errno.
 * `out` must have room for 4 events a node of the largest pipeline, and 16 more. */
int relay_poll(struct relay_engine *e, int64_t timeout_ns, struct relay_event *out, int max);
/* One sweep of one pipeline, without waiting: for tests. */
int relay_sweep(struct relay_engine *e, struct relay_pipeline *p, struct relay_event *out, int max);

/* A newcomer, with `sink` and `after_ns` set, begins `keep` bytes back at a border; one that stays, at what comes
 * next. Between sweeps, like all below. */
void relay_ring_join(struct relay_ring *ring, struct relay_reader *reader);
void relay_ring_leave(struct relay_ring *ring, struct relay_reader *reader);
/* A gap begins: `rest` has room for align - 1 bytes and stays until the gap has ended. */
void relay_ring_drop(struct relay_ring *ring, struct relay_reader *reader, char *rest);
/* A new stream begins with the next byte. */
void relay_ring_stream(struct relay_ring *ring);

/* What comes into a gate from now on is another stream; and: what comes from the next border on is dropped. */
void relay_gate_stream(struct relay_node *n);
void relay_gate_drop(struct relay_node *n);

/* A ferry's thread: wait for the next loaded pipe (its bytes; 0: the end), give it back, or do both until
 * the end (0), -errno on failure, -ENOBUFS when it must copy and has no buffer, -EINTR after relay_ferry_nudge. */
int64_t relay_ferry_wait(struct relay_ferry *f);
void relay_ferry_give_back(struct relay_ferry *f);
int relay_ferry_run(struct relay_ferry *f);
/* The engine's side: the thread is to look up before the next load; no more will come. */
void relay_ferry_nudge(struct relay_ferry *f);
void relay_ferry_end(struct relay_ferry *f);
/* Whether reserving blocks ahead of writing makes files on this one's filesystem cheaper (ferry.c). */
int relay_reserving_pays(int fd);

/* Thin calls, never blocking on the pipe side: bytes moved, or -errno. */
int64_t relay_lend(int pipe_w, const char *memory, int64_t size);
int64_t relay_tee(int pipe_r, int pipe_w, int64_t size);
int64_t relay_splice(int from, int64_t offset, int to, int64_t size, int more);
/* Asks again and again, for ns at most: 1 when `events` of poll(2) are there, 0 when not, or -errno. */
int relay_spin(int fd, int events, int64_t ns);

/* Has the allocator give back what it can, for a process that stays for long (heap.c). */
void relay_keep_heap_small(void);
/* Gives the kernel back what is free now. */
void relay_trim_heap(void);

/* Memory that is lent (memory.c). What is mapped at `from` moves to `to`, read-only unless `writable`; `from` stays
 * mapped, and empty where it is private: 0 or -errno. Both are whole pages, `to` private anonymous ones. */
int relay_cut(char *from, char *to, int64_t size, int writable);
/* Lends up to 1024 pieces in order, each an offset from base and a length: bytes lent, or -errno. */
int64_t relay_lend_pieces(int pipe_w, const char *base, const int64_t *pieces, int count);
enum { RELAY_OWN_COPY = 2 };
/* Whole pages of the file `fd` (-1: fresh private ones) take the place of the mapping at `at`: 0 or -errno. `writable`:
 * 0 for reading, 1 for writing to the file, RELAY_OWN_COPY for writing to copies that nobody else sees. */
int relay_map_over(char *at, int64_t size, int fd, int64_t offset, int writable);
/* Makes huge pages, all zeros, of the part of the file `fd` from `offset` on that is mapped at `at`, of as many whole ones
 * as there are. It must have been empty, and is whatever comes of this: 0 or -errno. */
int relay_enlarge(char *at, int64_t size, int fd, int64_t offset);
/* Nothing can be mapped at `at` until relay_vacate: 0, or -errno where something is. */
int relay_occupy(char *at, int64_t size);
void relay_vacate(char *at, int64_t size);
/* As memcpy, by the fastest way there is for much memory. */
void relay_copy(char *to, const char *from, int64_t size);
