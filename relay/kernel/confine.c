/* Giving up rights.
 *
 * Facts (man 2 seccomp, 7 landlock, 2 prctl):
 * - A filter sees numbers, which differ between processors, so the list of names is turned into numbers here.
 * - SECCOMP_FILTER_FLAG_TSYNC puts every thread of the process under the filter, or none. Landlock holds for the
 *   calling thread and whatever it starts later.
 * - Neither can be taken back. Both want no_new_privs first.
 * - Threads begin under the filters of the one that starts them. A filter that comes later is asked besides the earlier
 *   ones, and the strictest answer counts.
 *
 * The structs and numbers of Landlock are written out: not every libc's headers have them. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "confine.h"

#define LANDLOCK_CREATE 444
#define LANDLOCK_ADD 445
#define LANDLOCK_RESTRICT 446
#define BENEATH_PATH 1
#define TCP_PORT 2

_Static_assert(sizeof(struct relay_step) == sizeof(struct sock_filter), "a step is an instruction");
_Static_assert(offsetof(struct relay_step, value) == offsetof(struct sock_filter, k), "a step is an instruction");

#define CALL(name) { #name, __NR_##name }

static const struct relay_call allowed[] = {
    /* moving bytes */
    CALL(read), CALL(write), CALL(readv), CALL(writev), CALL(pread64), CALL(pwrite64), CALL(preadv), CALL(pwritev),
    CALL(preadv2), CALL(pwritev2), CALL(splice), CALL(tee), CALL(vmsplice), CALL(sendfile), CALL(copy_file_range),
    CALL(sync_file_range), CALL(fsync), CALL(fdatasync), CALL(fadvise64), CALL(readahead), CALL(lseek),
    /* sockets */
    CALL(socket), CALL(socketpair), CALL(bind), CALL(listen), CALL(accept4), CALL(connect), CALL(shutdown),
    CALL(getsockname), CALL(getpeername), CALL(getsockopt), CALL(setsockopt), CALL(sendto), CALL(recvfrom),
    CALL(sendmsg), CALL(recvmsg), CALL(sendmmsg), CALL(recvmmsg), CALL(accept),
    /* files */
    CALL(openat), CALL(close), CALL(close_range), CALL(dup), CALL(dup3), CALL(fcntl), CALL(flock), CALL(ioctl),
    CALL(ftruncate), CALL(truncate), CALL(fallocate), CALL(fstat), CALL(newfstatat), CALL(statx), CALL(fstatfs),
    CALL(statfs), CALL(getdents64), CALL(readlinkat), CALL(faccessat), CALL(faccessat2), CALL(getcwd), CALL(umask),
    CALL(fchmod), CALL(fchmodat), CALL(fchown), CALL(fchownat), CALL(utimensat), CALL(mkdirat), CALL(mknodat),
    CALL(unlinkat), CALL(renameat2), CALL(linkat), CALL(symlinkat), CALL(pipe2), CALL(memfd_create), CALL(eventfd2),
    CALL(openat2),
#ifdef __NR_renameat
    CALL(renameat),
#endif
    /* waiting, time */
    CALL(epoll_create1), CALL(epoll_ctl), CALL(epoll_pwait), CALL(ppoll), CALL(pselect6), CALL(clock_gettime),
    CALL(clock_getres), CALL(clock_nanosleep), CALL(nanosleep), CALL(gettimeofday), CALL(restart_syscall),
    CALL(timerfd_create), CALL(timerfd_settime), CALL(timerfd_gettime), CALL(setitimer), CALL(getitimer),
    /* memory */
    CALL(brk), CALL(mmap), CALL(munmap), CALL(mremap), CALL(mprotect), CALL(madvise), CALL(msync),
    CALL(membarrier), CALL(get_mempolicy),
    /* threads and signals of its own */
    CALL(clone), CALL(futex), CALL(set_robust_list), CALL(get_robust_list), CALL(set_tid_address), CALL(rt_sigaction),
    CALL(rt_sigprocmask), CALL(rt_sigreturn), CALL(rt_sigtimedwait), CALL(rt_sigpending), CALL(rt_sigsuspend),
    CALL(sigaltstack), CALL(tgkill), CALL(exit), CALL(exit_group), CALL(sched_yield), CALL(sched_getaffinity),
    CALL(getcpu), CALL(prctl),
    /* who and where it is */
    CALL(getpid), CALL(gettid), CALL(getppid), CALL(getuid), CALL(geteuid), CALL(getgid), CALL(getegid),
    CALL(getresuid), CALL(getresgid), CALL(getgroups), CALL(getrusage), CALL(times), CALL(prlimit64), CALL(sysinfo),
    CALL(uname), CALL(getrandom), CALL(capget), CALL(getpgid), CALL(getsid),
#ifdef __NR_rseq
    CALL(rseq),
#endif
#ifdef __NR_epoll_pwait2
    CALL(epoll_pwait2),
#endif
    /* what older processors have beside these */
#ifdef __NR_open
    CALL(open), CALL(stat), CALL(lstat), CALL(access), CALL(readlink), CALL(mkdir), CALL(rmdir), CALL(mknod),
    CALL(unlink), CALL(rename), CALL(link), CALL(symlink), CALL(chmod), CALL(chown), CALL(lchown), CALL(dup2),
    CALL(pipe), CALL(poll), CALL(select), CALL(epoll_create), CALL(epoll_wait), CALL(eventfd), CALL(getpgrp),
    CALL(time), CALL(arch_prctl),
#endif
};

static const struct relay_call becoming[] = {
    CALL(seccomp), CALL(setgroups), CALL(setresgid), CALL(setresuid),
};

const struct relay_call *relay_calls(int *count)
{
    *count = (int)(sizeof allowed / sizeof allowed[0]);
    return allowed;
}

const struct relay_call *relay_calls_becoming(int *count)
{
    *count = (int)(sizeof becoming / sizeof becoming[0]);
    return becoming;
}

uint32_t relay_arch(void)
{
#if defined(__x86_64__)
    return AUDIT_ARCH_X86_64;
#elif defined(__aarch64__)
    return AUDIT_ARCH_AARCH64;
#elif defined(__riscv) && __riscv_xlen == 64
    return AUDIT_ARCH_RISCV64;
#else
    return 0;
#endif
}

static int answer(long said) { return said < 0 ? -errno : (int)said; }

int relay_no_new_privileges(void) { return answer(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)); }

int relay_filter(const struct relay_step *steps, int count)
{
    struct sock_fprog program = { .len = (unsigned short)count, .filter = (struct sock_filter *)steps };
    return answer(syscall(__NR_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program));
}

int relay_landlock_version(void) { return answer(syscall(LANDLOCK_CREATE, NULL, 0, 1)); }

int relay_landlock_rules(uint64_t files, uint64_t ports, uint64_t scoped)
{
    struct { uint64_t files, ports, scoped; } kinds = { files, ports, scoped };
    /* a kernel that does not know a field takes the struct as long as the field is 0 */
    return answer(syscall(LANDLOCK_CREATE, &kinds, sizeof kinds, 0));
}

int relay_landlock_path(int rules, uint64_t access, int fd)
{
    struct { uint64_t access; int32_t fd; } __attribute__((packed)) rule = { access, fd };
    return answer(syscall(LANDLOCK_ADD, rules, BENEATH_PATH, &rule, 0));
}

int relay_landlock_port(int rules, uint64_t access, uint64_t port)
{
    struct { uint64_t access, port; } rule = { access, port };
    return answer(syscall(LANDLOCK_ADD, rules, TCP_PORT, &rule, 0));
}

int relay_landlock_enter(int rules) { return answer(syscall(LANDLOCK_RESTRICT, rules, 0)); }
