/* The process-wide half of the shim: SPDK's environment, its log, and registered memory. */
#define _GNU_SOURCE
#include "shim_common.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include <spdk/env.h>
#include <spdk/log.h>

#if __has_include(<spdk/version.h>)
#include <spdk/version.h>
#endif
#ifndef SPDK_VERSION_STRING
#define SPDK_VERSION_STRING "SPDK of unknown version"
#endif

enum { DRIVES_MAX = 64 };

static pthread_mutex_t log_mutex = PTHREAD_MUTEX_INITIALIZER;
static char log_text[PSP_TEXT_BYTES];
static pthread_mutex_t environment_mutex = PTHREAD_MUTEX_INITIALIZER;
static bool environment_started;

uint32_t
psp_abi(void)
{
	return PSP_ABI;
}

const char *
psp_built_against(void)
{
	return SPDK_VERSION_STRING;
}

void
psp_say(char *error, size_t error_bytes, const char *format, ...)
{
	va_list arguments;

	if (error == NULL || error_bytes == 0) {
		return;
	}
	va_start(arguments, format);
	vsnprintf(error, error_bytes, format, arguments);
	va_end(arguments);
}

static void
keep_log(int level, const char *file, const int line, const char *function, const char *format, va_list arguments)
{
	(void)file;
	(void)line;
	(void)function;
	if (level > SPDK_LOG_ERROR) {
		return;
	}
	pthread_mutex_lock(&log_mutex);
	vsnprintf(log_text, sizeof(log_text), format, arguments);
	log_text[strcspn(log_text, "\n")] = '\0';
	pthread_mutex_unlock(&log_mutex);
}

void
psp_log_last(char *text, size_t text_bytes)
{
	pthread_mutex_lock(&log_mutex);
	snprintf(text, text_bytes, "%s", log_text);
	pthread_mutex_unlock(&log_mutex);
}

void
psp_log_clear(void)
{
	pthread_mutex_lock(&log_mutex);
	log_text[0] = '\0';
	pthread_mutex_unlock(&log_mutex);
}

static int
fill_options(struct spdk_env_opts *opts, const struct psp_environment *options, struct spdk_pci_addr *drives,
	     char *error, size_t error_bytes)
{
	uint32_t i;

	memset(opts, 0, sizeof(*opts));
#ifdef PSP_HAS_ENV_OPTS_SIZE
	opts->opts_size = sizeof(*opts);
#endif
	spdk_env_opts_init(opts);
	opts->name = "penstock";
	opts->core_mask = options->cores;
	opts->mem_size = options->memory_mib;
	opts->no_pci = options->no_pci != 0;
	opts->hugepage_single_segments = options->hugepage_single_segments != 0;
	if (options->no_huge) {
#ifdef PSP_HAS_NO_HUGE
		opts->no_huge = true;
#else
		psp_say(error, error_bytes, "%s has no option no_huge; SPDK 24.01 or later has it", SPDK_VERSION_STRING);
		return -ENOTSUP;
#endif
	}
	if (options->pci_allowed_count > DRIVES_MAX) {
		psp_say(error, error_bytes, "%u PCIe drives are named; at most %d", options->pci_allowed_count, DRIVES_MAX);
		return -EINVAL;
	}
	for (i = 0; i < options->pci_allowed_count; i++) {
		if (spdk_pci_addr_parse(&drives[i], options->pci_allowed[i]) != 0) {
			psp_say(error, error_bytes, "%s is no PCIe address", options->pci_allowed[i]);
			return -EINVAL;
		}
	}
	if (options->pci_allowed_count) {
		opts->pci_allowed = drives;
		opts->num_pci_addr = options->pci_allowed_count;
	}
	return 0;
}

static void *
start_environment(void *argument)
{
	return (void *)(intptr_t)spdk_env_init(argument);
}

/* DPDK pins the thread that starts it to a core, so a thread of its own does. */
static int
start_elsewhere(struct spdk_env_opts *opts, char *error, size_t error_bytes)
{
	pthread_t thread;
	void *result = NULL;
	int rc = pthread_create(&thread, NULL, start_environment, opts);

	if (rc != 0) {
		psp_say(error, error_bytes, "no thread to start the environment: %s", strerror(rc));
		return -rc;
	}
	pthread_join(thread, &result);
	rc = (int)(intptr_t)result;
	if (rc != 0) {
		char last[PSP_TEXT_BYTES];

		psp_log_last(last, sizeof(last));
		psp_say(error, error_bytes, "%s (%s)", last[0] ? last : "spdk_env_init failed", strerror(abs(rc)));
		return rc < 0 ? rc : -EIO;
	}
	return 0;
}

int
psp_environment_start(const struct psp_environment *options, char *error, size_t error_bytes)
{
	struct spdk_pci_addr drives[DRIVES_MAX];
	struct spdk_env_opts opts;
	int rc;

	pthread_mutex_lock(&environment_mutex);
	if (environment_started) {
		rc = -EALREADY;
	} else {
		spdk_log_open(keep_log);
		psp_log_clear();
		rc = fill_options(&opts, options, drives, error, error_bytes);
		if (rc == 0) {
			rc = start_elsewhere(&opts, error, error_bytes);
		}
		environment_started = rc == 0;
	}
	pthread_mutex_unlock(&environment_mutex);
	return rc;
}

int
psp_memory_register(void *address, uint64_t bytes)
{
	return spdk_mem_register(address, bytes);
}

int
psp_memory_unregister(void *address, uint64_t bytes)
{
	return spdk_mem_unregister(address, bytes);
}
