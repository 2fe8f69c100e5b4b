/* Products on the matrix unit that some CPUs have: 16 rows by 16 outputs, 64 bytes of input, in one instruction.
 *
 * Each output of each row is still a sum of its own, over the inputs in one order, so a row is the same bits in any
 * company. In bfloat16 that order is not the one of AVX-512 (even and odd inputs are summed apart), so a process uses
 * one of the two for all its forwards; sums of integers are exact either way.
 *
 * Tiles 0 to 3 are sums, 4 and 5 inputs, 6 and 7 weights.
 */
#ifndef SEQUOIA_AMX_H
#define SEQUOIA_AMX_H

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define HAS_AMX 1

#include <sys/syscall.h>
#include <unistd.h>

enum { AMX_ROWS = 16, AMX_BYTES = 64, AMX_WORDS = AMX_BYTES / 4 };

typedef union {
    float floats[4][AMX_ROWS][LANES];
    int32_t integers[4][AMX_ROWS][LANES];
} __attribute__((aligned(64))) Sums;

/* Linux gives the unit's registers only to processes that ask for them. */
static int amx_is_permitted(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
}

static void amx_begin(void) {
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } __attribute__((aligned(64))) config = {
        .palette = 1,
        .row_bytes = {[0 ... 7] = AMX_BYTES},
        .rows = {[0 ... 7] = AMX_ROWS},
    };
    _tile_loadconfig(&config);
}

static void amx_end(void) { _tile_release(); }

/* The weights of one step are 16 lines of 128 bytes, half of each for either tile; see `fetch_ahead`. */
static inline void amx_load_weights(const void *w) {
    _tile_loadd(6, w, 2 * AMX_BYTES);
    _tile_loadd(7, (const char *)w + AMX_BYTES, 2 * AMX_BYTES);
    for (int line = 0; line < AMX_ROWS; line++) fetch_ahead((const char *)w + line * 2 * AMX_BYTES, 2 * AMX_BYTES);
}

static inline void amx_clear(int two) {
    _tile_zero(0);
    _tile_zero(1);
    if (!two) return;
    _tile_zero(2);
    _tile_zero(3);
}

static inline void amx_store(Sums *sums, int two) {
    _tile_stored(0, sums->floats[0], AMX_BYTES);
    _tile_stored(1, sums->floats[1], AMX_BYTES);
    if (!two) return;
    _tile_stored(2, sums->floats[2], AMX_BYTES);
    _tile_stored(3, sums->floats[3], AMX_BYTES);
}

/* Up to two times 16 rows of input, `x` and `second` (NULL: none), by one panel, `steps` times 64 bytes of inputs. */
static inline __attribute__((always_inline)) void amx_sum(const int floats, const void *weights, int steps,
                                                          const uint32_t *x, const uint32_t *second, Sums *sums) {
    const char *w = weights;
    amx_clear(second != 0);
    for (int step = 0; step < steps; step++, w += AMX_ROWS * 2 * AMX_BYTES, x += AMX_ROWS * AMX_WORDS) {
        amx_load_weights(w);
        _tile_loadd(4, x, AMX_BYTES);
        if (floats) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        } else {
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
        }
        if (!second) continue;
        _tile_loadd(5, second, AMX_BYTES);
        second += AMX_ROWS * AMX_WORDS;
        if (floats) {
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        } else {
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    amx_store(sums, second != 0);
}

#else
#define HAS_AMX 0
#endif
#endif
