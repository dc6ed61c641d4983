/*
 * What differs between the server headers of PostgreSQL 14 to 18, given one spelling each.
 * Only names and signatures: where behaviour differs, the reason stands beside the code that cares.
 */
#ifndef EXCIMER_REDO_VERSIONS_H
#define EXCIMER_REDO_VERSIONS_H

#include "access/rmgr.h"
#include "access/xlog.h"
#include "access/xlog_internal.h"
#include "access/xlogreader.h"
#include "access/xlogrecord.h"
#include "access/xlogutils.h"
#include "storage/buf_internals.h"
#include "storage/bufmgr.h"
#include "storage/smgr.h"

#if PG_VERSION_NUM < 140000 || PG_VERSION_NUM >= 190000
#error "the redo worker is written for PostgreSQL 14 to 18"
#endif

/* RelFileNode became RelFileLocator in 16. */
#if PG_VERSION_NUM >= 160000
#include "storage/relfilelocator.h"
typedef RelFileLocator Locator;
#define LOCATOR(spc, db, rel) ((Locator){.spcOid = (spc), .dbOid = (db), .relNumber = (rel)})
#define LOCATORS_EQUAL(a, b) RelFileLocatorEquals(a, b)
#define BLOCK_LOCATOR(block) ((block)->rlocator)
#define SMGR_LOCATOR(smgr) ((smgr)->smgr_rlocator)
#define DROP_BUFFERS DropRelationBuffers
#else
#include "storage/relfilenode.h"
typedef RelFileNode Locator;
#define LOCATOR(spc, db, rel) ((Locator){.spcNode = (spc), .dbNode = (db), .relNode = (rel)})
#define LOCATORS_EQUAL(a, b) RelFileNodeEquals(a, b)
#define BLOCK_LOCATOR(block) ((block)->rnode)
#define SMGR_LOCATOR(smgr) ((smgr)->smgr_rnode)
#define DROP_BUFFERS DropRelFileNodeBuffers
#endif

/* Backend ids became process numbers in 17. */
#if PG_VERSION_NUM >= 170000
#define NO_BACKEND INVALID_PROC_NUMBER
#else
#define NO_BACKEND InvalidBackendId
#endif

/* The whole-relation read function got an argument for permanence in 15. */
#if PG_VERSION_NUM >= 150000
#define READ_BUFFER(locator, fork, block, mode) \
    ReadBufferWithoutRelcache(locator, fork, block, mode, NULL, true)
#else
#define READ_BUFFER(locator, fork, block, mode) ReadBufferWithoutRelcache(locator, fork, block, mode, NULL)
#endif

/* Since 15 extensions may register resource managers, and the table has holes. */
#if PG_VERSION_NUM >= 150000
#define RMGR_EXISTS(rmid) ((rmid) <= RM_MAX_ID && RmgrIdExists(rmid))
#else
#define RMGR_EXISTS(rmid) ((rmid) <= RM_MAX_ID)
#endif

#endif
