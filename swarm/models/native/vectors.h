/* Registers full of floats, and sums whose order is the same wherever they are made. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* How many floats a register has. */
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif

typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef float floats_anywhere __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));

INLINE floats load(const float *from) { return *(const floats_anywhere *)from; }
INLINE void store(float *to, floats what) { *(floats_anywhere *)to = what; }
/* The same of a register that is not full. */
INLINE floats load_some(const float *from, int64_t count) {
    if (count >= WIDTH) return load(from);
    float some[WIDTH] = {0};
    memcpy(some, from, count * sizeof *some);
    return load(some);
}
INLINE void store_some(float *to, floats what, int64_t count) {
    if (count >= WIDTH)
        store(to, what);
    else
        memcpy(to, &what, count * sizeof *to);
}

INLINE int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }
INLINE int64_t greatest(int64_t one, int64_t other) { return one > other ? one : other; }

/* A long sum is made in so many parts; then halves of them are added until one is left. */
#define PARTS 16

INLINE float sum_of(const float *parts) {
    float sums[PARTS];
    memcpy(sums, parts, sizeof sums);
    for (int width = PARTS / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) sums[i] += sums[i + width];
    return sums[0];
}

INLINE float dot(const float *one, const float *other, int64_t count) {
    float parts[PARTS] = {0}, rest = 0;
    int64_t at = 0;
    for (; at + PARTS <= count; at += PARTS)
        for (int i = 0; i < PARTS; i++) parts[i] += one[at + i] * other[at + i];
    for (; at < count; at++) rest += one[at] * other[at];
    return sum_of(parts) + rest;
}

/* Of `parts`, `to` sums of two neighbours: halves of `one` and `other` are brought side by side and added. */
#if defined(__AVX512F__)
typedef __m512 Register;
#elif defined(__AVX2__)
typedef __m256 Register;
#endif
#define FOLD(to, low, high)                                                             \
    UNROLL for (int i = 0; i < to; i++) {                                               \
        const Register one = (Register)parts[2 * i], other = (Register)parts[2 * i + 1]; \
        parts[i] = (floats)low + (floats)high;                                          \
    }

/* For each of WIDTH sums, of which the first WIDTH parts are left: what `sum_of` makes of these. */
INLINE floats sums_of(floats *parts) {
#if defined(__AVX512F__)
    FOLD(8, _mm512_shuffle_f32x4(one, other, 0x44), _mm512_shuffle_f32x4(one, other, 0xee))
    FOLD(4, _mm512_shuffle_f32x4(one, other, 0x88), _mm512_shuffle_f32x4(one, other, 0xdd))
    FOLD(2, _mm512_shuffle_ps(one, other, 0x44), _mm512_shuffle_ps(one, other, 0xee))
    FOLD(1, _mm512_shuffle_ps(one, other, 0x88), _mm512_shuffle_ps(one, other, 0xdd))
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (floats)_mm512_permutexvar_ps(order, (Register)parts[0]);
#elif defined(__AVX2__)
    FOLD(4, _mm256_permute2f128_ps(one, other, 0x20), _mm256_permute2f128_ps(one, other, 0x31))
    FOLD(2, _mm256_shuffle_ps(one, other, 0x44), _mm256_shuffle_ps(one, other, 0xee))
    FOLD(1, _mm256_shuffle_ps(one, other, 0x88), _mm256_shuffle_ps(one, other, 0xdd))
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return (floats)_mm256_permutevar8x32_ps((Register)parts[0], order);
#else
    floats sums;
    for (int sum = 0; sum < WIDTH; sum++) {
        floats left = parts[sum];
        for (int half = WIDTH / 2; half > 0; half /= 2)
            for (int i = 0; i < half; i++) left[i] += left[i + half];
        sums[sum] = left[0];
    }
    return sums;
#endif
}

/* e to the power of `x` (between -87 and 88), to a unit or two in the last place: 2^n times a polynomial, that of
   Cephes' expf. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = rintf(x * 1.44269504f);
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return y * power;
}
