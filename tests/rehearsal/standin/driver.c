/* The driver's library: standin.py adds the rest of its functions, which succeed. */
static char context;
int cuCtxGetCurrent(void **current) { *current = &context; return 0; }
