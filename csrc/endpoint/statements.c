/*
 * CREATE TABLESPACE is refused before it touches a file; CREATE EXTENSION, COLLATION and DATABASE say how to get what
 * this build lacks.
 *
 * A tablespace is a directory outside of what a branch consists of, or (in place) one that no start directory would
 * bring back. All else that names one (CREATE DATABASE, SET TABLESPACE, ...) fails by itself: there is none to name.
 */
#include "endpoint.h"

#include "nodes/parsenodes.h"
#include "tcop/utility.h"

static ProcessUtility_hook_type process_before = NULL;

static void refuse_tablespace(void)
{
    ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED), errmsg("tablespaces are not supported on this storage"),
                    errdetail("All data of a branch lies on the page server, which spreads it by itself."),
                    errhint("Leave out the tablespace: everything can be in pg_default.")));
}

static void pass_on(PlannedStmt *statement, const char *text, bool is_read_only_tree, ProcessUtilityContext context,
                    ParamListInfo parameters, QueryEnvironment *environment, DestReceiver *destination,
                    QueryCompletion *completion)
{
    (process_before != NULL ? process_before : standard_ProcessUtility)(
        statement, text, is_read_only_tree, context, parameters, environment, destination, completion);
}

/* Whether what a statement asks for may be missing from the build: an extension, or ICU. */
static bool may_ask_too_much(Node *statement)
{
    return IsA(statement, CreateExtensionStmt) || IsA(statement, CreatedbStmt) ||
           (IsA(statement, DefineStmt) && ((DefineStmt *) statement)->kind == OBJECT_COLLATION);
}

static void run_statement(PlannedStmt *statement, const char *text, bool is_read_only_tree,
                          ProcessUtilityContext context, ParamListInfo parameters, QueryEnvironment *environment,
                          DestReceiver *destination, QueryCompletion *completion)
{
    MemoryContext caller = CurrentMemoryContext;

    if (IsA(statement->utilityStmt, CreateTableSpaceStmt))
        refuse_tablespace();
    if (!may_ask_too_much(statement->utilityStmt) || extension_hint == NULL || extension_hint[0] == '\0') {
        pass_on(statement, text, is_read_only_tree, context, parameters, environment, destination, completion);
        return;
    }
    PG_TRY();
    {
        pass_on(statement, text, is_read_only_tree, context, parameters, environment, destination, completion);
    }
    PG_CATCH();
    {
        ErrorData *error;

        MemoryContextSwitchTo(caller);
        error = CopyErrorData();
        /* No control file: 0A000 from 15 on, before that 58P01, which is also a script that is missing. No ICU: 0A000. */
        if (error->sqlerrcode == ERRCODE_FEATURE_NOT_SUPPORTED || error->sqlerrcode == ERRCODE_UNDEFINED_FILE) {
            FlushErrorState();
            error->hint = extension_hint;
            ReThrowError(error);
        }
        PG_RE_THROW();
    }
    PG_END_TRY();
}

void guard_statements(void)
{
    process_before = ProcessUtility_hook;
    ProcessUtility_hook = run_statement;
}
