/*
 * The load generator, the receivers and the accountant of the benchmarks: one small program, compiled by the
 * harness, the same for every contender.
 *
 *   load feed BYTES CHUNK              writes BYTES to stdout in chunks of CHUNK bytes, at most 1 MiB
 *   load feed BYTES CHUNK PORT|PATH    the same to 127.0.0.1:PORT or a unix socket, once somebody listens there
 *   load lend BYTES CHUNK              the same to a pipe, but the pages of eight chunks in turn are lent (vmsplice), not copied
 *   load receive HOW tcp COUNT   listens on COUNT ports of 127.0.0.1, one connection each
 *   load receive HOW unix PATH...   listens on unix sockets, one connection each
 *   load receive HOW fifo CAPACITY PATH...   reads fifos; CAPACITY in bytes, 0 leaves the system's default
 *   load fetch HOW PORT NAME     receives what an http server at 127.0.0.1:PORT, once there is one, has by that name
 *   load keep FD ARGV...         runs a command, waits for it and for all it leaves behind, and writes the KiB of
 *                                the largest process among them to FD
 *   load burn MILLISECONDS       uses that much CPU time; a known quantity to test the accounting with
 *
 * HOW is `discard` (the bytes are dropped inside the kernel; unix sockets cannot and are read), `read` (copied to user memory and dropped), or a
 * list of descriptors such as `5,6,7,8` (each stream is written to its own, for whoever computes a digest).
 *
 * `feed` sends by plain write(). How fast it copies bounds every contender that passes pages on, so some cells are fed by
 * `lend`, which costs next to nothing: there contenders bound themselves.
 * Times are nanoseconds of CLOCK_MONOTONIC. Every failure ends the program with a message and status 1.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK = 1 << 20, PAGE = 4096, MOST = 64, LENT = 8 };

static unsigned char chunk[CHUNK] __attribute__((aligned(PAGE)));

static void die(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now_ns(clockid_t clock)
{
    struct timespec t;
    if (clock_gettime(clock, &t) != 0)
        die("clock_gettime");
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void put(int fd, const unsigned char *bytes, size_t length)
{
    while (length > 0) {
        ssize_t n = write(fd, bytes, length);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            die("write");
        bytes += n;
        length -= (size_t)n;
    }
}

static struct sockaddr_in loopback(int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

static struct sockaddr_un at_path(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        die(path);
    }
    strcpy(address.sun_path, path);
    return address;
}

/* Nobody listens yet while the contender is starting: try again each millisecond, for 20 s. */
static int connected(const char *to)
{
    int is_path = strchr(to, '/') != NULL;
    struct sockaddr_in port = loopback(is_path ? 0 : atoi(to));
    struct sockaddr_un path = at_path(is_path ? to : "");
    struct timespec pause = {.tv_nsec = 1000000};
    for (int attempt = 0; attempt < 20000; attempt++) {
        int fd = socket(is_path ? AF_UNIX : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0)
            die("socket");
        if ((is_path ? connect(fd, (struct sockaddr *)&path, sizeof path)
                     : connect(fd, (struct sockaddr *)&port, sizeof port)) == 0)
            return fd;
        if (errno != ECONNREFUSED && errno != ENOENT)
            die("connect");
        close(fd);
        nanosleep(&pause, NULL);
    }
    errno = ETIMEDOUT;
    die("connect: nobody listens");
    return -1;
}

static void fill(unsigned char *to)
{
    uint64_t state = 0x9e3779b97f4a7c15u; /* any odd constant: the stream is the same each time */
    for (size_t i = 0; i < CHUNK; i += sizeof state) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        memcpy(to + i, &state, sizeof state);
    }
}

/* Pages that were lent are never written to again: each carries its chunk's number of LENT, so that a digest notices
 * what is lost. */
static int lend(int64_t size, size_t piece)
{
    static unsigned char lent[LENT][CHUNK] __attribute__((aligned(PAGE)));
    for (uint64_t number = 0; number < LENT; number++) {
        fill(lent[number]);
        for (size_t i = 0; i < CHUNK; i += PAGE)
            memcpy(lent[number] + i, &number, sizeof number);
    }
    int64_t start = now_ns(CLOCK_MONOTONIC), left = size;
    for (uint64_t number = 0; left > 0; number++) {
        size_t length = left < (int64_t)piece ? (size_t)left : piece;
        struct iovec one = {.iov_base = lent[number % LENT], .iov_len = length};
        left -= (int64_t)length;
        while (one.iov_len > 0) {
            ssize_t n = vmsplice(STDOUT_FILENO, &one, 1, 0);
            if (n < 0 && errno == EINTR)
                continue;
            if (n < 0)
                die("vmsplice");
            one.iov_base = (unsigned char *)one.iov_base + n;
            one.iov_len -= (size_t)n;
        }
    }
    close(STDOUT_FILENO);
    fprintf(stderr, "fed %lld %lld\n", (long long)size, (long long)start);
    return 0;
}

static int feed(int64_t size, size_t piece, const char *to)
{
    fill(chunk);
    int fd = to ? connected(to) : STDOUT_FILENO;
    int64_t start = now_ns(CLOCK_MONOTONIC), left = size;
    for (uint64_t number = 0; left > 0; number++) {
        /* Each page carries the number of its chunk, so that a digest notices chunks lost or out of order. */
        for (size_t i = 0; i < piece; i += PAGE)
            memcpy(chunk + i, &number, sizeof number);
        size_t length = left < (int64_t)piece ? (size_t)left : piece;
        put(fd, chunk, length);
        left -= (int64_t)length;
    }
    if (to) {
        if (shutdown(fd, SHUT_WR) != 0)
            die("shutdown");
        while (read(fd, chunk, CHUNK) > 0) /* until the contender closes: a close now could reset */
            ;
    }
    close(fd);
    fprintf(stderr, "fed %lld %lld\n", (long long)size, (long long)start);
    return 0;
}

struct stream {
    int fd, out;
    int64_t bytes, first, last; /* first and last: when bytes came, in ns; 0 if none ever did */
};

enum how { DISCARD, READ, PASS };
enum kind { FIFO, TCP, UNIX };

/* Takes what is there without waiting. Returns 0 at the end of the stream, 1 otherwise. */
static int take(struct stream *s, enum how how, enum kind kind, int null)
{
    ssize_t n;
    if (how != DISCARD || kind == UNIX)
        n = kind != FIFO ? recv(s->fd, chunk, CHUNK, MSG_DONTWAIT) : read(s->fd, chunk, CHUNK);
    else if (kind == TCP)
        n = recv(s->fd, NULL, CHUNK, MSG_DONTWAIT | MSG_TRUNC); /* tcp(7): dropped without being copied */
    else
        n = splice(s->fd, NULL, null, NULL, CHUNK, SPLICE_F_NONBLOCK);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return 1;
    if (n < 0)
        die("receive");
    if (n == 0)
        return 0;
    s->last = now_ns(CLOCK_MONOTONIC);
    if (s->bytes == 0)
        s->first = s->last;
    s->bytes += n;
    if (how == PASS)
        put(s->out, chunk, (size_t)n);
    return 1;
}

static int listening_at(enum kind kind, const char *path)
{
    struct sockaddr_in port = loopback(0);
    struct sockaddr_un local = at_path(kind == UNIX ? path : "");
    socklen_t length = sizeof port;
    int fd = socket(kind == UNIX ? AF_UNIX : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 ||
        (kind == UNIX ? bind(fd, (struct sockaddr *)&local, sizeof local) : bind(fd, (struct sockaddr *)&port, length)) ||
        listen(fd, 1) != 0)
        die("listen");
    if (kind == TCP) {
        if (getsockname(fd, (struct sockaddr *)&port, &length) != 0)
            die("getsockname");
        printf("%d ", ntohs(port.sin_port));
    }
    return fd;
}

static enum how how_of(const char *text)
{
    return strcmp(text, "discard") == 0 ? DISCARD : strcmp(text, "read") == 0 ? READ : PASS;
}

static void report_stream(const struct stream *s)
{
    printf("received %lld %lld %lld\n", (long long)s->bytes, (long long)s->first, (long long)s->last);
}

/* The head of an answer, which must say 200, and not a byte more. */
static void skip_head(int fd)
{
    static const char ends[] = "\r\n\r\n";
    char *end;
    ssize_t n;
    do {
        n = recv(fd, chunk, PAGE, MSG_PEEK);
        if (n <= 0)
            die("the head of the answer");
        end = memmem(chunk, (size_t)n, ends, 4);
    } while (!end && n < PAGE);
    if (!end || strncmp((char *)chunk + strlen("HTTP/1.1"), " 200", 4) != 0) {
        fprintf(stderr, "load: the answer is %.40s\n", (char *)chunk);
        exit(1);
    }
    n = end + 4 - (char *)chunk;
    if (recv(fd, chunk, (size_t)n, MSG_WAITALL) != n)
        die("the head of the answer");
}

static int fetch(const char *how_text, const char *port, const char *name)
{
    struct stream s = {0};
    enum how how = how_of(how_text);
    if (how == PASS)
        s.out = atoi(how_text);
    printf("ready\n");
    fflush(stdout);
    s.fd = connected(port);
    if (dprintf(s.fd, "GET /%s HTTP/1.0\r\n\r\n", name) < 0)
        die("GET");
    skip_head(s.fd);
    struct pollfd wait = {.fd = s.fd, .events = POLLIN};
    do
        if (poll(&wait, 1, -1) < 0)
            die("poll");
    while (take(&s, how, TCP, -1));
    report_stream(&s);
    return 0;
}

static int receive(const char *how_text, enum kind kind, int count, char **rest)
{
    static struct stream streams[MOST];
    static struct pollfd polls[MOST];
    enum how how = how_of(how_text);
    int null = open("/dev/null", O_WRONLY | O_CLOEXEC), listening[MOST] = {0};
    char *next = (char *)how_text;
    if (null < 0)
        die("/dev/null");
    for (int i = 0; i < count; i++) {
        struct stream *s = &streams[i];
        s->fd = -1;
        if (how == PASS)
            s->out = (int)strtol(next, &next, 10), next += *next == ',';
        if (kind != FIFO) {
            s->fd = listening_at(kind, kind == UNIX ? rest[i] : NULL);
            listening[i] = 1;
        } else {
            /* Nonblocking: the open does not wait for a writer, and poll reports no end before one came. */
            s->fd = open(rest[1 + i], O_RDONLY | O_NONBLOCK | O_CLOEXEC);
            if (s->fd < 0)
                die(rest[1 + i]);
            if (atoi(rest[0]) > 0 && fcntl(s->fd, F_SETPIPE_SZ, atoi(rest[0])) < 0)
                die("F_SETPIPE_SZ");
        }
        polls[i] = (struct pollfd){.fd = s->fd, .events = POLLIN};
    }
    printf("ready\n");
    fflush(stdout);
    for (int open_streams = count; open_streams > 0;) {
        if (poll(polls, (nfds_t)count, -1) < 0)
            die("poll");
        for (int i = 0; i < count; i++) {
            struct stream *s = &streams[i];
            if (polls[i].fd < 0 || polls[i].revents == 0)
                continue;
            if (listening[i]) {
                int fd = accept4(s->fd, NULL, NULL, SOCK_CLOEXEC);
                if (fd < 0)
                    die("accept");
                close(s->fd);
                s->fd = polls[i].fd = fd;
                listening[i] = 0;
            } else if (take(s, how, kind, null) == 0) {
                close(s->fd);
                if (how == PASS)
                    close(s->out);
                polls[i].fd = -1;
                open_streams--;
            }
        }
    }
    for (int i = 0; i < count; i++)
        report_stream(&streams[i]);
    return 0;
}

/*
 * The whole CPU of a command is what wait4() tells of its keeper: a subreaper inherits every descendant whose
 * parent died or did not wait, and waits for all of them. Each is counted once, by its parent or here.
 */
static int keep(int report, char **argv)
{
    struct rusage usage;
    int status, result = 1;
    pid_t pid, ended;
    if (prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0)
        die("PR_SET_CHILD_SUBREAPER");
    if (fcntl(report, F_SETFD, FD_CLOEXEC) != 0)
        die("report");
    pid = fork();
    if (pid < 0)
        die("fork");
    if (pid == 0) {
        execvp(argv[0], argv);
        die(argv[0]);
    }
    for (int fd = 0; fd < 2; fd++) /* an end kept open here would hide the end of the stream from others */
        close(fd);
    while ((ended = wait(&status)) > 0 || errno == EINTR)
        if (ended == pid)
            result = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    if (getrusage(RUSAGE_CHILDREN, &usage) != 0 || dprintf(report, "%ld\n", usage.ru_maxrss) < 0)
        die("report");
    return result;
}

static int burn(int64_t milliseconds)
{
    while (now_ns(CLOCK_PROCESS_CPUTIME_ID) < milliseconds * 1000000)
        ;
    return 0;
}

int main(int argc, char **argv)
{
    if (argc >= 4 && strcmp(argv[1], "feed") == 0 && atoll(argv[3]) > 0 && atoll(argv[3]) <= CHUNK)
        return feed(atoll(argv[2]), (size_t)atoll(argv[3]), argc > 4 ? argv[4] : NULL);
    if (argc == 4 && strcmp(argv[1], "lend") == 0 && atoll(argv[3]) > 0 && atoll(argv[3]) <= CHUNK)
        return lend(atoll(argv[2]), (size_t)atoll(argv[3]));
    if (argc == 5 && strcmp(argv[1], "receive") == 0 && strcmp(argv[3], "tcp") == 0 && atoi(argv[4]) <= MOST)
        return receive(argv[2], TCP, atoi(argv[4]), NULL);
    if (argc >= 5 && strcmp(argv[1], "receive") == 0 && strcmp(argv[3], "unix") == 0 && argc - 4 <= MOST)
        return receive(argv[2], UNIX, argc - 4, argv + 4);
    if (argc >= 6 && strcmp(argv[1], "receive") == 0 && strcmp(argv[3], "fifo") == 0 && argc - 5 <= MOST)
        return receive(argv[2], FIFO, argc - 5, argv + 4);
    if (argc == 5 && strcmp(argv[1], "fetch") == 0)
        return fetch(argv[2], argv[3], argv[4]);
    if (argc >= 4 && strcmp(argv[1], "keep") == 0)
        return keep(atoi(argv[2]), argv + 3);
    if (argc == 3 && strcmp(argv[1], "burn") == 0)
        return burn(atoll(argv[2]));
    fprintf(stderr, "load: usage is at the top of load.c\n");
    return 2;
}
