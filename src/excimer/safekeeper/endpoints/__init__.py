"""Where bytes of the outside become calls: proposers, WAL readers, HTTP management."""
