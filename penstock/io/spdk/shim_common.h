/* What the two halves of the shim share. */
#ifndef PENSTOCK_SPDK_SHIM_COMMON_H
#define PENSTOCK_SPDK_SHIM_COMMON_H

#include <stdio.h>

#include "shim.h"

void psp_say(char *error, size_t error_bytes, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* The last error that SPDK logged since psp_log_clear, or "" */
void psp_log_last(char *text, size_t text_bytes);
void psp_log_clear(void);

#endif
