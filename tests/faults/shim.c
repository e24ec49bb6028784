/* Fails or kills at the nth file event below a folder: a library for LD_PRELOAD on Linux.

   Events are calls that change files: open for writing, write, fsync, rename, link, unlink, mkdir, rmdir, truncate, copies
   between descriptors. A test arms the library by calling `fault_arm`; `fault_disarm` says how many events there were.
   Relative paths count as below the folder if the current folder is, and names relative to a descriptor if that was
   opened below it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, KILL, FAIL, SHORT, TORN }; /* TORN: half of a write, then killed */
enum { DESCRIPTORS = 1 << 16 };

static char root[PATH_MAX];
static int kind, number, lasting, no_exchange;
static long place;
static atomic_long events;
static char last[PATH_MAX + 32];
static unsigned char watched[DESCRIPTORS];

void fault_arm(const char *folder, int wanted, int error, long at, int stays, int without_exchange) {
  snprintf(root, sizeof root, "%s", folder);
  kind = wanted, number = error, place = at, lasting = stays, no_exchange = without_exchange;
  last[0] = 0;
  atomic_store(&events, 0);
}

long fault_disarm(void) {
  root[0] = 0;
  return atomic_load(&events);
}

const char *fault_last(void) { return last; } /* the event that was failed, in words */

static int is_below(int folder, const char *path) {
  char whole[PATH_MAX * 2];
  if (!root[0] || !path) return 0;
  if (path[0] != '/') {
    if (folder != AT_FDCWD) return folder >= 0 && folder < DESCRIPTORS && watched[folder];
    if (!getcwd(whole, PATH_MAX)) return 0;
    strcat(whole, "/");
    strncat(whole, path, PATH_MAX - 1);
    path = whole;
  }
  size_t length = strlen(root);
  return !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

static int is_watched(int descriptor) {
  return root[0] && descriptor >= 0 && descriptor < DESCRIPTORS && watched[descriptor];
}

static int watch(int descriptor, int below) {
  if (descriptor >= 0 && descriptor < DESCRIPTORS) watched[descriptor] = (unsigned char)below;
  return descriptor;
}

/* Counts an event. What is to happen to it: NONE or a kind; FAIL has set errno. `removal`: a full disk allows it. */
static int fault(const char *call, const char *path, int removal) {
  long now = atomic_fetch_add(&events, 1) + 1;
  if (kind == NONE || now < place || (now > place && !lasting)) return NONE;
  if (kind == FAIL && removal && (number == ENOSPC || number == EDQUOT)) return NONE;
  if ((kind == SHORT || kind == TORN) && strcmp(call, "write")) return NONE;
  if (!last[0]) snprintf(last, sizeof last, "%s %s", call, path ? path : "");
  if (kind == KILL) kill(getpid(), SIGKILL);
  errno = number;
  return kind;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRITES (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)

#define OPENS(name, DECLARED, CALLED, FOLDER)                                       \
  int name DECLARED {                                                               \
    mode_t mode = 0;                                                                \
    if ((flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE) {                    \
      va_list rest;                                                                 \
      va_start(rest, flags);                                                        \
      mode = va_arg(rest, mode_t);                                                  \
      va_end(rest);                                                                 \
    }                                                                               \
    int below = is_below(FOLDER, path);                                             \
    if (below && (flags & WRITES) && fault("open", path, 0)) return -1;             \
    return watch(NEXT(name) CALLED, below);                                         \
  }
OPENS(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPENS(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPENS(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), folder)
OPENS(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), folder)

#define STREAMS(name)                                                               \
  FILE *name(const char *path, const char *mode) {                                  \
    int below = is_below(AT_FDCWD, path);                                           \
    if (below && strpbrk(mode, "wa+") && fault("open", path, 0)) return NULL;       \
    FILE *file = NEXT(name)(path, mode);                                            \
    if (file) watch(fileno(file), below);                                           \
    return file;                                                                    \
  }
STREAMS(fopen)
STREAMS(fopen64)

int close(int descriptor) {
  watch(descriptor, 0);
  return NEXT(close)(descriptor);
}

/* Writes of `size` bytes, or of half of them. */
#define WRITE(name, DECLARED, CALLED)                                               \
  ssize_t name DECLARED {                                                           \
    int what = is_watched(descriptor) ? fault("write", NULL, 0) : NONE;             \
    if (what == FAIL) return -1;                                                    \
    if (what == SHORT || what == TORN) size = size > 1 ? size / 2 : size;           \
    ssize_t done = NEXT(name) CALLED;                                               \
    if (what == TORN) kill(getpid(), SIGKILL);                                      \
    return done;                                                                    \
  }
WRITE(write, (int descriptor, const void *from, size_t size), (descriptor, from, size))
WRITE(pwrite, (int descriptor, const void *from, size_t size, off_t at), (descriptor, from, size, at))
WRITE(pwrite64, (int descriptor, const void *from, size_t size, off64_t at), (descriptor, from, size, at))
WRITE(sendfile, (int descriptor, int in, off_t *at, size_t size), (descriptor, in, at, size))
WRITE(sendfile64, (int descriptor, int in, off64_t *at, size_t size), (descriptor, in, at, size))

ssize_t writev(int descriptor, const struct iovec *from, int count) {
  if (!is_watched(descriptor)) return NEXT(writev)(descriptor, from, count);
  return write(descriptor, from[0].iov_base, from[0].iov_len); /* a short write is always allowed */
}

ssize_t copy_file_range(int in, off64_t *in_at, int descriptor, off64_t *at, size_t size, unsigned flags) {
  int what = is_watched(descriptor) ? fault("write", NULL, 0) : NONE;
  if (what == FAIL) return -1;
  ssize_t done = NEXT(copy_file_range)(in, in_at, descriptor, at, what && size > 1 ? size / 2 : size, flags);
  if (what == TORN) kill(getpid(), SIGKILL);
  return done;
}

#define ON_DESCRIPTOR(name, call, DECLARED, CALLED)                                 \
  int name DECLARED {                                                               \
    if (is_watched(descriptor) && fault(call, NULL, 0)) return -1;                  \
    return NEXT(name) CALLED;                                                       \
  }
ON_DESCRIPTOR(fsync, "fsync", (int descriptor), (descriptor))
ON_DESCRIPTOR(fdatasync, "fsync", (int descriptor), (descriptor))
ON_DESCRIPTOR(ftruncate, "truncate", (int descriptor, off_t size), (descriptor, size))
ON_DESCRIPTOR(ftruncate64, "truncate", (int descriptor, off64_t size), (descriptor, size))

#define ON_PATH(name, call, removal, DECLARED, CALLED, FOLDER)                      \
  int name DECLARED {                                                               \
    if (is_below(FOLDER, path) && fault(call, path, removal)) return -1;            \
    return NEXT(name) CALLED;                                                       \
  }
ON_PATH(truncate, "truncate", 0, (const char *path, off_t size), (path, size), AT_FDCWD)
ON_PATH(mkdir, "mkdir", 0, (const char *path, mode_t mode), (path, mode), AT_FDCWD)
ON_PATH(mkdirat, "mkdir", 0, (int folder, const char *path, mode_t mode), (folder, path, mode), folder)
ON_PATH(rmdir, "rmdir", 1, (const char *path), (path), AT_FDCWD)
ON_PATH(unlink, "unlink", 1, (const char *path), (path), AT_FDCWD)
ON_PATH(unlinkat, "unlink", 1, (int folder, const char *path, int flags), (folder, path, flags), folder)
ON_PATH(rename, "rename", 0, (const char *from, const char *path), (from, path), AT_FDCWD)
ON_PATH(renameat, "rename", 0, (int old, const char *from, int folder, const char *path), (old, from, folder, path), folder)
ON_PATH(link, "link", 0, (const char *from, const char *path), (from, path), AT_FDCWD)
ON_PATH(linkat, "link", 0, (int old, const char *from, int folder, const char *path, int flags),
        (old, from, folder, path, flags), folder)
ON_PATH(symlink, "link", 0, (const char *from, const char *path), (from, path), AT_FDCWD)

int renameat2(int old, const char *from, int folder, const char *path, unsigned flags) {
  if (is_below(folder, path)) {
    if (no_exchange && flags) {
      errno = EINVAL;
      return -1;
    }
    if (fault("rename", path, 0)) return -1;
  }
  return NEXT(renameat2)(old, from, folder, path, flags);
}
