/* Compile what follows for more than the oldest processor of its kind; `api.c` asks the processor before it calls.
 *
 * In the source, not in the build's options: so one build serves every machine, and nothing is built for this one.
 */
#ifdef __clang__
#define TARGET_PRAGMA(text) _Pragma(#text)
#define BEGIN_TARGET(features) \
    TARGET_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#else
#define TARGET_PRAGMA(text) _Pragma(#text)
#define BEGIN_TARGET(features) TARGET_PRAGMA(GCC target(features))
#endif
