/* Preloaded before libc: the nth write or sync of a store's file fails, and `count` of them from there on.
   Counted only for files whose name has "losscast.db" in it. A write that fails with ENOSPC first writes half. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int seen, from = -1, many, code;

void arm(int nth, int count, int err) { seen = 0; from = nth; many = count; code = err; }
int calls(void) { return seen; }

static int ours(int fd) {
    char link[64], name[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, name, sizeof name - 1);
    if (n <= 0) return 0;
    name[n] = 0;
    return strstr(name, "losscast.db") != NULL && strstr(name, "-shm") == NULL;
}

static int fails(int fd) {
    if (!ours(fd)) return 0;
    int at = seen++;
    return from >= 0 && at >= from && at < from + many;
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, name)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (!fails(fd)) return real(fd, data, size);
    if (code == ENOSPC && size > 1) return real(fd, data, size / 2);
    errno = code;
    return -1;
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    if (!fails(fd)) return real(fd, data, size, at);
    if (code == ENOSPC) { if (size > 1) real(fd, data, size / 2, at); }
    errno = code;
    return -1;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return pwrite64(fd, data, size, at); }

int fsync(int fd) {
    REAL(int, "fsync", int);
    if (!fails(fd)) return real(fd);
    errno = code;
    return -1;
}

int fdatasync(int fd) {
    REAL(int, "fdatasync", int);
    if (!fails(fd)) return real(fd);
    errno = code;
    return -1;
}

int ftruncate64(int fd, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    if (!fails(fd)) return real(fd, size);
    errno = code;
    return -1;
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }
