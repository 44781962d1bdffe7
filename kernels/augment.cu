// Training images from bytes: y = (v / 255 − mean) / std of an image seen shifted, flipped and with a rectangle erased.
//
// Images are bytes `[images, h, w, c]`, a whole data set or one batch; a view per image of the batch says which one it is
// and how it is looked at. Normalisation is a table of 256 values per channel, so that the numbers are the host's to the
// last bit before they are rounded to T. Which view an image gets is drawn on the host, from (seed, epoch, image).
// Called once per training step, before the forward pass. Bound by memory: reads a byte and writes a T per element.
//
// Blocks have 256 threads, of which each writes one 16-byte vector where h·w·c is a whole number of them, else single
// elements; no dynamic shared memory.
//
// augment<T, VECTOR>     grid (pieces of an image, n) of `LaneConfig`; VECTOR: y is aligned to 16 bytes     6 instances
//     (const u8* images, const ImageView* views [n], const float* tables [c, 256], T* y [n, h, w, c], int h, int w, int c)
//
// instances: augment<{float,f16,bf16}, {true,false}>

#include "random.cuh"
#include "vector.cuh"

/// How an image is looked at; the Rust side has the same struct under `repr(C)`. 48 bytes.
struct ImageView {
    /// Stream of the noise in the erased rectangle.
    u64 stream;
    /// Which of the images.
    int image;
    /// Row and column of the image that come to the upper left corner; black where there is none.
    int down, right;
    int flip;
    /// The erased rectangle; height 0 for none.
    int top, left, height, width;
    /// 0 erases to the mean, 1 to noise.
    int noisy;
    int reserved;
};

template <typename T, bool VECTOR>
__global__ void __launch_bounds__(256) augment(
    const u8* __restrict__ images,          // [images, h, w, c]
    const ImageView* __restrict__ views,    // [n]
    const float* __restrict__ tables,       // [c, 256]
    T* __restrict__ y,                      // [n, h, w, c]
    int h, int w, int c) {
    constexpr int N = VECTOR ? VECTOR_LEN<T> : 1;
    const int size = h * w * c;
    const int begin = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (begin >= size) return;
    const ImageView view = views[blockIdx.y];
    const u8* const image = images + static_cast<i64>(view.image) * size;
    int channel = begin % c, column = begin / c % w, row = begin / c / w;
    float values[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int line = row + view.down, seen = (view.flip != 0 ? w - 1 - column : column) + view.right;
        const bool inside = line >= 0 && line < h && seen >= 0 && seen < w;
        const int byte = inside ? image[(line * w + seen) * c + channel] : 0;
        values[i] = tables[channel * 256 + byte];
        const bool erased = row >= view.top && row < view.top + view.height && column >= view.left &&
                            column < view.left + view.width;
        if (erased) values[i] = view.noisy != 0 ? noise(view.stream, static_cast<u64>(begin + i)) : 0.0f;
        if (++channel < c) continue;
        channel = 0;
        if (++column < w) continue;
        column = 0;
        row++;
    }
    store_floats<N>(y + static_cast<i64>(blockIdx.y) * size + begin, values);
}
