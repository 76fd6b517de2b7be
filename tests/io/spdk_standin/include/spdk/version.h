/* Stand-in for tests. */
#ifndef SPDK_VERSION_STRING
#define SPDK_VERSION_STRING "the stand-in of Penstock's tests"
#endif
