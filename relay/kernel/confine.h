/* Giving up rights: what the kernel calls no_new_privs, Landlock and seccomp. Like pump.h this file has no
 * preprocessor lines. Each function gives 0, or what is said, or -errno. */

struct relay_call {
    const char *name;
    int number;
};

/* One instruction of a filter, as linux/filter.h lays it out. */
struct relay_step {
    uint16_t code;
    uint8_t yes;
    uint8_t no;
    uint32_t value;
};

/* The system calls that relay makes, as this processor numbers them; `count` gets how many. */
const struct relay_call *relay_calls(int *count);
/* Those that it makes besides, once, to become another user and then to do without them. */
const struct relay_call *relay_calls_becoming(int *count);
/* Which processor's numbers these are, as seccomp says it. */
uint32_t relay_arch(void);
/* Nothing that this thread starts gets more rights than it has. */
int relay_no_new_privileges(void);
/* From now on, and for good, the filter decides on every call of every thread. */
int relay_filter(const struct relay_step *steps, int count);
/* Which version of Landlock there is; -ENOSYS or -EOPNOTSUPP without any. */
int relay_landlock_version(void);
/* A set of rules that forbids these kinds of access but for its rules: a descriptor, the caller's. */
int relay_landlock_rules(uint64_t files, uint64_t ports, uint64_t scoped);
/* Allows `access` to the file that `fd` is, or beneath the directory. */
int relay_landlock_path(int rules, uint64_t access, int fd);
/* Allows `access` to a tcp port. */
int relay_landlock_port(int rules, uint64_t access, uint64_t port);
/* From now on, and for good, the rules hold for this thread and those that it starts. */
int relay_landlock_enter(int rules);
