/*
 * The module's beginning. It is loaded last of all preloaded libraries, so that it sees what they have registered.
 */
#include "endpoint.h"

#include "fmgr.h"
#include "miscadmin.h"
#include "utils/guc.h"

/* All else is hidden. Headers before 15 do not say by themselves that these are not. */
#pragma GCC visibility push(default)
PG_MODULE_MAGIC;
void _PG_init(void);
#pragma GCC visibility pop

char *extension_hint = NULL;

void _PG_init(void)
{
    if (!process_shared_preload_libraries_in_progress)
        return;
    DefineCustomStringVariable("excimer.extension_hint",
                               "What helps somebody who asks for an extension that this build does not have.", NULL,
                               &extension_hint, "", PGC_POSTMASTER, GUC_NO_SHOW_ALL | GUC_NOT_IN_SAMPLE, NULL, NULL,
                               NULL);
    define_background_settings();
    define_admission_settings();
    define_cache_settings();
    keep_hot_buffers();
    EmitWarningsOnPlaceholders("excimer");
    guard_apply_commits();
    guard_init_forks();
    guard_statements();
    guard_superuser_login();
    guard_admission();
    guard_background_work();
    tell_replay();
}
