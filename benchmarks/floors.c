/*
 * The bare loops: what the system calls of a job cost when nothing but them is done. No policies, no second stream, no
 * errors but fatal ones: a relay of any kind can get near these figures, and not below them by the same calls.
 *
 *   floors chain IN OUT...        by reference: tee for all sinks but the last, splice out; blocking, with a pipe between
 *                                 each two sinks, since tee always starts at the head of a pipe
 *   floors sendfile FILE OUT...   sendfile, a MiB to each in turn
 *   floors files IN FILE...       recv of 512 KiB into memory, which wakes nobody before so much is there, write of 128 KiB
 *                                 to each; blocks are reserved 4 MiB ahead
 *   floors direct IN FILE...      recv of a whole MiB, one write of it past the page cache (O_DIRECT)
 *   floors proxy LISTEN TO        both ways between tcp connections: epoll_wait, recv and send, edge-triggered; until it
 *                                 is killed
 *
 * IN: `-` (stdin, a pipe), `tcp:PORT` or `unix:PATH`, where it listens for one connection. OUT: `tcp:PORT`, `unix:PATH` or
 * `fifo:PATH`. Tcp is that of 127.0.0.1 and not paced (reno), pipes are of 1 MiB. Every failure ends the program with a
 * message and status 1. The load, the clock and the account are those of the cells: see floors.py.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/sendfile.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { MIB = 1 << 20, LOAD = 512 << 10, PUT = 128 << 10, AHEAD = 4 << 20, MOST = 64, DESCRIPTORS = 1 << 15, BATCH = 256 };

static char memory[MIB] __attribute__((aligned(4096)));

static void die(const char *what)
{
    fprintf(stderr, "floors: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* ---- the ends */

static const char *after(const char *end, const char *kind)
{
    size_t length = strlen(kind);
    return strncmp(end, kind, length) == 0 ? end + length : NULL;
}

static socklen_t place_of(const char *end, struct sockaddr_storage *place)
{
    const char *port = after(end, "tcp:"), *path = after(end, "unix:");
    struct sockaddr_in *in = (struct sockaddr_in *)place;
    struct sockaddr_un *un = (struct sockaddr_un *)place;
    memset(place, 0, sizeof *place);
    if (port) {
        in->sin_family = AF_INET;
        in->sin_port = htons((uint16_t)atoi(port));
        in->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        return sizeof *in;
    }
    if (!path || strlen(path) >= sizeof un->sun_path) {
        errno = EINVAL;
        die(end);
    }
    un->sun_family = AF_UNIX;
    strcpy(un->sun_path, path);
    return sizeof *un;
}

static int made(int family)
{
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1, size = MIB;
    if (fd < 0)
        die("socket");
    if (family == AF_INET) {
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
    } else {
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    }
    return fd;
}

static int listening(const char *end, int backlog)
{
    struct sockaddr_storage place;
    socklen_t size = place_of(end, &place);
    int fd = made(place.ss_family);
    if (bind(fd, (struct sockaddr *)&place, size) != 0 || listen(fd, backlog) != 0)
        die(end);
    return fd;
}

static int in(const char *end)
{
    int fd, from;
    if (strcmp(end, "-") == 0)
        return STDIN_FILENO;
    from = listening(end, 1);
    fd = accept4(from, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0)
        die("accept");
    close(from);
    return fd;
}

static int out(const char *end)
{
    struct sockaddr_storage place;
    const char *path = after(end, "fifo:");
    int fd;
    if (path) {
        fd = open(path, O_WRONLY | O_CLOEXEC);
        if (fd < 0 || fcntl(fd, F_SETPIPE_SZ, MIB) < 0)
            die(path);
        return fd;
    }
    socklen_t size = place_of(end, &place);
    fd = made(place.ss_family);
    if (connect(fd, (struct sockaddr *)&place, size) != 0)
        die(end);
    return fd;
}

/* ---- by reference */

static int pipes[MOST][2], sinks[MOST], count;

static void splice_out(int from, int to, ssize_t amount)
{
    while (amount > 0) {
        ssize_t n = splice(from, NULL, to, NULL, (size_t)amount, SPLICE_F_MOVE);
        if (n <= 0)
            die("splice");
        amount -= n;
    }
}

/* What stands in the pipe before sink `i`: to it, and to all after it. */
static void pass_on(int i, ssize_t amount)
{
    while (amount > 0) {
        ssize_t n = amount;
        if (i + 1 < count && (n = tee(pipes[i][0], pipes[i + 1][1], (size_t)amount, 0)) <= 0)
            die("tee");
        splice_out(pipes[i][0], sinks[i], n);
        if (i + 1 < count)
            pass_on(i + 1, n);
        amount -= n;
    }
}

static int chain(int source, char **ends)
{
    int first = source != STDIN_FILENO;
    ssize_t n;
    for (int i = 0; i < count; i++) {
        sinks[i] = out(ends[i]);
        if (i == 0 && !first) {
            pipes[0][0] = source;
            continue;
        }
        if (pipe2(pipes[i], O_CLOEXEC) != 0 || fcntl(pipes[i][0], F_SETPIPE_SZ, MIB) < 0)
            die("pipe");
    }
    for (;;) {
        if (first)
            n = splice(source, NULL, pipes[0][1], NULL, MIB, SPLICE_F_MOVE);
        else if (count == 1)
            n = splice(source, NULL, sinks[0], NULL, MIB, SPLICE_F_MOVE);
        else
            n = tee(source, pipes[1][1], MIB, 0);
        if (n < 0)
            die("reading");
        if (n == 0)
            return 0;
        if (first) {
            pass_on(0, n);
        } else if (count > 1) {
            splice_out(source, sinks[0], n);
            pass_on(1, n);
        }
    }
}

static int by_sendfile(const char *path, char **ends)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat about;
    if (fd < 0 || fstat(fd, &about) != 0)
        die(path);
    for (int i = 0; i < count; i++)
        sinks[i] = out(ends[i]);
    for (off_t begun = 0; begun < about.st_size; begun += MIB) {
        off_t end = begun + MIB < about.st_size ? begun + MIB : about.st_size;
        for (int i = 0; i < count; i++)
            for (off_t at = begun; at < end;)
                if (sendfile(sinks[i], fd, &at, (size_t)(end - at)) <= 0)
                    die("sendfile");
    }
    return 0;
}

/* ---- into files */

static ssize_t filled(int source, size_t size, int flags)
{
    ssize_t n = recv(source, memory, size, flags);
    if (n < 0)
        die("recv");
    return n;
}

static void put(int fd, ssize_t size, ssize_t most)
{
    for (ssize_t at = 0; at < size;) {
        ssize_t n = write(fd, memory + at, (size_t)(size - at < most ? size - at : most));
        if (n <= 0)
            die("write");
        at += n;
    }
}

static int into_files(int source, int direct, char **paths)
{
    off_t at = 0, reserved = 0;
    int mark = LOAD;
    ssize_t n;
    for (int i = 0; i < count; i++)
        if ((sinks[i] = open(paths[i], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | (direct ? O_DIRECT : 0), 0644)) < 0)
            die(paths[i]);
    if (!direct && setsockopt(source, SOL_SOCKET, SO_RCVLOWAT, &mark, sizeof mark) != 0)
        die("SO_RCVLOWAT");
    while ((n = direct ? filled(source, MIB, MSG_WAITALL) : filled(source, LOAD, 0)) > 0) {
        for (int i = 0; i < count; i++) {
            if (at + n > reserved)
                fallocate(sinks[i], FALLOC_FL_KEEP_SIZE, at, n + AHEAD);
            if (direct && n < MIB)  /* the last one is no whole number of blocks */
                fcntl(sinks[i], F_SETFL, O_WRONLY);
            put(sinks[i], n, direct ? MIB : PUT);
        }
        if (at + n > reserved)
            reserved = at + n + AHEAD;
        at += n;
    }
    for (int i = 0; i < count; i++)
        if (ftruncate(sinks[i], at) != 0)
            die("ftruncate");
    return 0;
}

/* ---- both ways */

static int other[DESCRIPTORS];

static void meet(int epoll, int from, const char *to)
{
    int fd = accept4(from, NULL, NULL, SOCK_CLOEXEC), one = 1;
    if (fd < 0)
        die("accept");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    int peer = out(to);
    if (fd >= DESCRIPTORS || peer >= DESCRIPTORS) {
        errno = EMFILE;
        die("accept");
    }
    other[fd] = peer;
    other[peer] = fd;
    for (int each = fd; each >= 0; each = each == fd ? peer : -1) {
        struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.fd = each};
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, each, &event) != 0)
            die("epoll_ctl");
    }
}

static void turn(int fd)
{
    ssize_t n;
    do {
        n = recv(fd, memory, 64 << 10, MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n <= 0) {
            close(other[fd]);
            close(fd);
            return;
        }
        if (send(other[fd], memory, (size_t)n, MSG_NOSIGNAL) != n)
            die("send");
    } while (n == 64 << 10);    /* a short read was all */
}

static void proxy(const char *listen_at, const char *to)
{
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    static struct epoll_event got[BATCH];
    int epoll = epoll_create1(EPOLL_CLOEXEC), from = listening(listen_at, 4096);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = from};
    if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, from, &event) != 0)
        die("epoll");
    for (;;) {
        int n = epoll_wait(epoll, got, BATCH, -1);
        if (n < 0 && errno != EINTR)
            die("epoll_wait");
        for (int i = 0; i < n; i++)
            if (got[i].data.fd == from)
                meet(epoll, from, to);
            else
                turn(got[i].data.fd);
    }
}

int main(int argc, char **argv)
{
    count = argc - 3;
    if (argc >= 4 && count <= MOST) {
        if (strcmp(argv[1], "chain") == 0)
            return chain(in(argv[2]), argv + 3);
        if (strcmp(argv[1], "sendfile") == 0)
            return by_sendfile(argv[2], argv + 3);
        if (strcmp(argv[1], "files") == 0)
            return into_files(in(argv[2]), 0, argv + 3);
        if (strcmp(argv[1], "direct") == 0)
            return into_files(in(argv[2]), 1, argv + 3);
        if (strcmp(argv[1], "proxy") == 0)
            proxy(argv[2], argv[3]);
    }
    fprintf(stderr, "floors: usage is at the top of floors.c\n");
    return 2;
}
