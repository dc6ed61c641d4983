/* Which descriptor of this process is which arena file. Set by open, copied by dup, inherited by fork. */
#define _GNU_SOURCE
#include "hydrate.h"

struct open_file open_files[DESCRIPTORS_MAX];

void track_descriptor(int fd, struct arena_file *file, int flags)
{
    struct stat status;
    if ((unsigned)fd >= DESCRIPTORS_MAX)
        return;
    open_files[fd].file = NULL;
    if (file != NULL && system_fstat(fd, &status) == 0)
        open_files[fd] = (struct open_file){file, status.st_ino, flags};
}

void forget_descriptor(int fd)
{
    if ((unsigned)fd < DESCRIPTORS_MAX)
        open_files[fd].file = NULL;
}

void copy_descriptor(int from, int to)
{
    if ((unsigned)to >= DESCRIPTORS_MAX)
        return;
    if ((unsigned)from < DESCRIPTORS_MAX)
        open_files[to] = open_files[from];
    else
        open_files[to].file = NULL;
}

bool is_same_file(int fd, struct stat *status)
{
    return system_fstat(fd, status) == 0 && status->st_ino == open_files[fd].inode;
}
