/* Consumes one stream from relay in blocks of shared memory, and adds its bytes up where they are.
 *
 *     cc -O2 -o consume examples/consume.c && ./consume /tmp/app.sock
 *     relay send big.iso --to shared:///tmp/app.sock      or, in a route: sink: {shared: "unix:///tmp/app.sock"}
 *
 * Every message from relay is one `struct header`. A ring (kind 2) comes with a memfd: `slot` slots of `size` bytes,
 * to be mapped once. A block (kind 3) says that `size` bytes are in slot `slot`; when it was read, `slot` and `turn`
 * go back, and relay writes there again. The end (kind 4) ends the stream; a connection that closes without it broke.
 * Nothing is mapped before its size and its seals are known to be right. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x10
#endif

enum { RING = 2, BLOCK = 3, END = 4 };
#define MOST (1ull << 30)   /* bytes of a ring that are mapped at most */

struct header {             /* little-endian, without padding */
    char magic[4];
    uint8_t kind, dimensions;
    uint16_t dtype_length;
    uint64_t size;
    uint32_t slot, turn;
    char dtype[32];
    uint64_t shape[32];
};
_Static_assert(sizeof(struct header) == 312, "no padding");

struct back {
    uint32_t slot, turn;
};

static int fail(const char *why)
{
    fprintf(stderr, "consume: %s\n", why);
    return 1;
}

/* One message and the descriptor that came with it, or -1: 1, 0 at the end of the connection, -1 for anything odd. */
static int next(int sock, struct header *h, int *fd)
{
    union { struct cmsghdr align; char room[CMSG_SPACE(sizeof(int))]; } control;
    struct iovec piece = { h, sizeof *h };
    struct msghdr m = { .msg_iov = &piece, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control };
    ssize_t n = recvmsg(sock, &m, MSG_CMSG_CLOEXEC);
    struct cmsghdr *c;

    *fd = -1;
    if (n <= 0)
        return n < 0 ? -1 : 0;
    for (c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS && c->cmsg_len == CMSG_LEN(sizeof(int)))
            memcpy(fd, CMSG_DATA(c), sizeof(int));
    return n == sizeof *h && !memcmp(h->magic, "RLY1", 4) && !(m.msg_flags & (MSG_CTRUNC | MSG_TRUNC)) ? 1 : -1;
}

/* The ring behind `fd`, mapped read-only, or NULL. Sealed against shrinking it cannot fault, and with all of its
 * pages there it takes no memory of ours. */
static const uint8_t *mapped(int fd, const struct header *h)
{
    int needed = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE, seals = fcntl(fd, F_GET_SEALS);
    uint64_t size;
    struct stat s;
    void *memory;

    if (!h->slot || h->slot > 128 || !h->size || h->size > MOST / h->slot)
        return NULL;
    size = h->size * h->slot;
    if (seals < 0 || (seals & needed) != needed || fstat(fd, &s) < 0 || (uint64_t)s.st_size != size
        || (uint64_t)s.st_blocks * 512 < size)
        return NULL;
    memory = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

int main(int argc, char **argv)
{
    struct sockaddr_un at = { .sun_family = AF_UNIX };
    const uint8_t *ring = NULL;
    uint64_t count = 0, total = 0, i;
    struct header h, shape = { .slot = 0 };
    int listener, sock, fd, got;

    if (argc != 2 || strlen(argv[1]) >= sizeof at.sun_path)
        return fail("give the path of a socket to listen on");
    strcpy(at.sun_path, argv[1]);
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&at, sizeof at) < 0 || listen(listener, 1) < 0)
        return fail("cannot listen there");
    printf("listening on %s\n", argv[1]);
    fflush(stdout);
    sock = accept(listener, NULL, NULL);
    unlink(argv[1]);
    close(listener);
    while ((got = next(sock, &h, &fd)) == 1 && h.kind != END) {
        if (h.kind == RING && fd >= 0) {
            if (ring)
                munmap((void *)(uintptr_t)ring, shape.size * shape.slot);
            ring = mapped(fd, &h);
            shape = h;
            close(fd);
            if (!ring)
                return fail("a ring that is not to be trusted");
        } else if (h.kind == BLOCK && ring && h.slot < shape.slot && h.size <= shape.size) {
            const uint8_t *block = ring + h.slot * shape.size;
            struct back back = { h.slot, h.turn };

            for (i = 0; i < h.size; i++)
                total += block[i];
            count += h.size;
            if (send(sock, &back, sizeof back, MSG_NOSIGNAL) != sizeof back)
                return fail("relay went away");
        } else {
            return fail("a message that is not to be trusted");
        }
    }
    if (got != 1)
        return fail("the stream broke off");
    printf("%llu bytes, their sum is %llu\n", (unsigned long long)count, (unsigned long long)total);
    return 0;
}
