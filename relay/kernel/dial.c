/* Connections in numbers: accepted many at a time, and connected with all their options in one call.
 *
 * Facts (man 2 accept, 7 tcp): an accepted socket has the tcp options of the one that listened, so those are set
 * there, once; one that connects has none. */
#include "calls.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>

#define RTO_MAX_MS 44 /* TCP_RTO_MAX_MS, Linux 6.15: not in every libc's headers */
#define BIND_NO_PORT 24 /* IP_BIND_ADDRESS_NO_PORT */

/* host:port, [v6]:port, or pid:N for a unix peer, as records name a peer. */
static void name_peer(int fd, const struct sockaddr_storage *peer, char *name, size_t room)
{
    char host[INET6_ADDRSTRLEN] = "";
    if (peer->ss_family == AF_INET) {
        const struct sockaddr_in *at = (const struct sockaddr_in *)peer;
        inet_ntop(AF_INET, &at->sin_addr, host, sizeof host);
        snprintf(name, room, "%s:%u", host, ntohs(at->sin_port));
    } else if (peer->ss_family == AF_INET6) {
        const struct sockaddr_in6 *at = (const struct sockaddr_in6 *)peer;
        int mapped = IN6_IS_ADDR_V4MAPPED(&at->sin6_addr);
        if (mapped)
            inet_ntop(AF_INET, &at->sin6_addr.s6_addr[12], host, sizeof host);
        else
            inet_ntop(AF_INET6, &at->sin6_addr, host, sizeof host);
        snprintf(name, room, mapped ? "%s:%u" : "[%s]:%u", host, ntohs(at->sin6_port));
    } else {
        struct ucred who = { .pid = 0 };
        socklen_t size = sizeof who;
        getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &size);
        snprintf(name, room, "pid:%d", (int)who.pid);
    }
}

int relay_accept(int fd, struct relay_accepted *out, int max)
{
    int count = 0;
    while (count < max) {
        struct sockaddr_storage peer;
        socklen_t size = sizeof peer;
        peer.ss_family = AF_UNSPEC;
        int got = accept4(fd, (struct sockaddr *)&peer, &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (got < 0 && (errno == EINTR || errno == ECONNABORTED))
            continue;
        if (got < 0)
            return count || errno == EAGAIN ? count : -errno;
        out[count].fd = got;
        name_peer(got, &peer, out[count].peer, sizeof out[count].peer);
        count++;
    }
    return count;
}

static void set(int fd, int level, int option, int value)
{
    setsockopt(fd, level, option, &value, sizeof value); /* one that this kernel has not does without */
}

/* The kernel sends from an address that is not its own if it is told so (IP_TRANSPARENT, for which a process needs
 * CAP_NET_ADMIN or CAP_NET_RAW); the port is chosen when it connects, so that it need not be free of all others. */
static int bind_from(int fd, int family, const char *from, int from_size)
{
    int one = 1, error;
    if (((const struct sockaddr *)from)->sa_family != family)
        return -EAFNOSUPPORT;
    if (family == AF_INET)
        error = setsockopt(fd, IPPROTO_IP, IP_TRANSPARENT, &one, sizeof one);
    else
        error = setsockopt(fd, IPPROTO_IPV6, IPV6_TRANSPARENT, &one, sizeof one);
    if (error < 0)
        return -errno;
    set(fd, IPPROTO_IP, BIND_NO_PORT, 1);
    return bind(fd, (const struct sockaddr *)from, (socklen_t)from_size) < 0 ? -errno : 0;
}

int dial_connect(const struct relay_dial *dial, const char *from, int from_size, int *connected)
{
    int fd = socket(dial->family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    *connected = 0;
    if (fd < 0)
        return -errno;
    if (dial->tcp) {
        set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
        set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
        set(fd, IPPROTO_TCP, TCP_KEEPIDLE, dial->idle);
        set(fd, IPPROTO_TCP, TCP_KEEPINTVL, dial->interval);
        set(fd, IPPROTO_TCP, TCP_KEEPCNT, dial->count);
        if (dial->unpaced)
            setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
        if (dial->longest_ms)
            set(fd, IPPROTO_TCP, RTO_MAX_MS, dial->longest_ms);
        if (from_size) {
            int error = bind_from(fd, dial->family, from, from_size);
            if (error) {
                close(fd);
                return error;
            }
        }
    }
    if (connect(fd, (const struct sockaddr *)dial->place, (socklen_t)dial->place_size) == 0) {
        *connected = 1;
    } else if (errno != EINPROGRESS) {
        int error = errno;
        close(fd);
        return -error;
    }
    return fd;
}

void relay_dial(struct relay_dialing *those, int count)
{
    int connected;
    for (int k = 0; k < count; k++)
        those[k].fd = dial_connect(those[k].dial, those[k].origin, those[k].origin_size, &connected);
}

void hang_up(int fd, int reset)
{
    struct linger at_once = { .l_onoff = 1, .l_linger = 0 };
    if (fd < 0)
        return;
    if (reset)
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    close(fd);
}

void relay_refuse(int fd) { hang_up(fd, 1); }
