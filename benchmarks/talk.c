/*
 * Both ends of many conversations through a contender, in one process with one epoll loop.
 *
 *   talk pingpong FROM TO CONNECTIONS BYTES MILLISECONDS   each connection sends BYTES, waits for their echo, sends again
 *   talk connects FROM TO CONNECTIONS BYTES MILLISECONDS   each connects, asks with BYTES, is answered with as many and
 *                                                          closed by the server, and begins anew
 *   talk idle     FROM TO CONNECTIONS BYTES                each sends once and is answered, then all stay open
 *
 * It listens on port TO of 127.0.0.1, prints `listening`, waits for a line on stdin, and connects to the contender at
 * port FROM; connections have addresses 127.0.1.1 to 127.0.1.250, so that no port runs out. Once all connections have been
 * answered once it prints `open` and waits for a line on stdin: the caller notes what the contender used so far.
 * After MILLISECONDS (idle: after another line on stdin) it prints
 *
 *   done ROUNDS NANOSECONDS P50 P99 P999 MOST
 *
 * ROUNDS is how many questions were answered, the last four are nanoseconds from a question to its answer. Every
 * failure ends the program with a message and status 1.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 20000, BATCH = 512, LARGEST = 1 << 16 };

struct end {
    int fd, server, number;
    int left;           /* of the message that is under way, to be received */
    int64_t asked;      /* when a client's question went out */
};

static char bytes[LARGEST], drop[LARGEST];
static int epoll, size, connects, from, answered, counting, stopped;
static int64_t rounds;
static uint32_t slower[64 * 64]; /* answers by time: 64 steps for each power of two */
static int64_t most;

static void die(const char *what)
{
    fprintf(stderr, "talk: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int step_of(int64_t ns)
{
    int power = 63 - __builtin_clzll((uint64_t)ns | 64);
    return power * 64 + (int)((ns >> (power - 6)) & 63);
}

static int64_t time_of(double part)
{
    int64_t seen = 0, want = (int64_t)(part * (double)rounds);
    for (int i = 0; i < 64 * 64; i++) {
        seen += slower[i];
        if (seen > want)
            return ((int64_t)64 + i % 64) << (i / 64 - 6);
    }
    return most;
}

static void say(struct end *e)
{
    int n = (int)send(e->fd, bytes, (size_t)size, MSG_NOSIGNAL);
    if (n != size)
        die("send");
}

static void add(struct end *e)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = e};
    int one = 1;
    setsockopt(e->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, e->fd, &event) != 0)
        die("epoll_ctl");
}

static void begin(struct end *e)
{
    static int turn;
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)from)}, own = {.sin_family = AF_INET};
    int one = 1;
    e->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    own.sin_addr.s_addr = htonl(0x7f000101u + (uint32_t)(turn++ % 250));
    setsockopt(e->fd, SOL_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    if (e->fd < 0 || bind(e->fd, (struct sockaddr *)&own, sizeof own) != 0)
        die("bind");
    if (connect(e->fd, (struct sockaddr *)&to, sizeof to) != 0)
        die("connect");
    e->left = size;
    add(e);
    e->asked = now_ns();
    say(e);
}

static void heard(struct end *e)
{
    int64_t now = now_ns(), took = now - e->asked;
    answered++;
    if (counting) {
        rounds++;
        slower[step_of(took)]++;
        if (took > most)
            most = took;
    }
    e->left = size;
    e->asked = now;
}

static void accept_all(int listening)
{
    static int number;
    for (;;) {
        int fd = accept4(listening, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        struct end *e;
        if (fd < 0 && errno == EAGAIN)
            return;
        if (fd < 0)
            die("accept");
        e = calloc(1, sizeof *e);
        *e = (struct end){.fd = fd, .server = 1, .number = number++, .left = size};
        add(e);
    }
}

/* A server answers a whole question; a client that got its whole answer asks again, or begins anew. */
static void turn(struct end *e, int idle)
{
    int n = (int)recv(e->fd, drop, (size_t)LARGEST, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n < 0 && !stopped)
        die(e->server ? "server: recv" : "client: recv");
    if (n <= 0) {
        close(e->fd);
        if (e->server) {
            free(e);
        } else if (!connects || e->left != 0) {
            errno = 0;
            die("client: the connection ended early");
        } else if (!stopped) {
            heard(e);
            begin(e);
        }
        return;
    }
    e->left -= n;
    if (e->left > 0)
        return;
    if (e->left < 0) {
        errno = 0;
        die("more came than was said");
    }
    if (e->server) {
        say(e);
        e->left = size;
        if (connects) {
            shutdown(e->fd, SHUT_WR);
        }
    } else if (!connects) {
        heard(e);
        if (idle)
            return;
        say(e);
    }
}

static void rest(int listening, int idle, int milliseconds)
{
    static struct epoll_event got[BATCH];
    int n = epoll_wait(epoll, got, BATCH, milliseconds);
    if (n < 0 && errno != EINTR)
        die("epoll_wait");
    for (int i = 0; i < n; i++) {
        if (got[i].data.ptr == NULL)
            accept_all(listening);
        else
            turn(got[i].data.ptr, idle);
    }
}

static void await_line(void)
{
    char one = 0;
    while (one != '\n')
        if (read(0, &one, 1) != 1)
            die("stdin");
}

int main(int argc, char **argv)
{
    static struct end clients[MOST];
    int idle = argc == 6 && strcmp(argv[1], "idle") == 0, count, one = 1;
    struct sockaddr_in here = {.sin_family = AF_INET};
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    int64_t start, end;
    if (argc != 7 && !idle) {
        fprintf(stderr, "talk: usage is at the top of talk.c\n");
        return 2;
    }
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) { /* two descriptors a connection, and a shell's limit is often 1024 */
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    connects = strcmp(argv[1], "connects") == 0;
    from = atoi(argv[2]);
    count = atoi(argv[4]);
    size = atoi(argv[5]);
    if (count > MOST || size > LARGEST)
        return 2;
    epoll = epoll_create1(EPOLL_CLOEXEC);
    int listening = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    here.sin_port = htons((uint16_t)atoi(argv[3]));
    here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listening, (struct sockaddr *)&here, sizeof here) != 0 || listen(listening, 4096) != 0)
        die("listen");
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, listening, &event) != 0)
        die("epoll_ctl");
    printf("listening\n");
    fflush(stdout);
    await_line();
    for (int i = 0; i < count; i++) {
        clients[i].number = i;
        begin(&clients[i]);
        rest(listening, idle, 0);
    }
    while (answered < count)
        rest(listening, idle, 20000);
    printf("open\n");
    fflush(stdout);
    await_line();
    counting = 1;
    start = now_ns();
    if (idle) {
        await_line();
    } else {
        end = start + (int64_t)atoi(argv[6]) * 1000000;
        while (now_ns() < end)
            rest(listening, 0, 20);
    }
    end = now_ns();
    stopped = 1;
    printf("done %lld %lld %lld %lld %lld %lld\n", (long long)rounds, (long long)(end - start), (long long)time_of(0.5),
           (long long)time_of(0.99), (long long)time_of(0.999), (long long)most);
    fflush(stdout);
    return 0;
}
