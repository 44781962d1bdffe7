// Implicit GEMM: the code that pointwise and dense convolutions share.
//
// Every pass is C[m, n] = Σ_k A[m, k]·B[k, n], one TILE_M x TILE_N tile of C per block:
//
//   pass      m              n            k              A                     B
//   forward   output pixel   c_out        tap, c_in      x under the kernel    w
//   dgrad     input pixel    c_in         tap, c_out     dy under the kernel   w
//   wgrad     c_out          tap, c_in    output pixel   dy                    x under the kernel
//
// Channels are innermost everywhere, so that an operand is a set of *lines*, elements that lie side by side in memory:
// a pixel's channels or a weight's. A tile of an operand is staged in shared memory as it lies in global memory, line
// by line, and nothing is transposed: where a line runs along k the tile is one major order of mma.cuh, and where it
// runs along m or n it is the other. Between the passes only the operands (who finds an element's address) and the
// writers of epilogue.cuh (who store the sums) differ; the loop below is the same for all.
//
// Tiles come by asynchronous copies (VECTOR, ARCH >= 800), or through registers that are loaded before and stored after
// the products of the tile before. f16 and bf16 are multiplied by tensor cores, float by 8x4 sums in the registers of a
// thread. Without VECTOR the elements are gathered one by one, and the rest is the same.
//
// TILE_M x TILE_N is 64x64 for all types, and 128x32, 128x128 and, forward, 128x64, 128x96 and 256x32 too for f16 and bf16;
// gemm_threads() is the size of a block. An element of C is summed over k in the same order in all of them, so that the choice
// changes no result. Where a tile has 128x64 or more, a warp has 64x32 sums instead of 32x32, for which it reads a quarter less of
// shared memory a product; the small ones suit products that have too few of the others to fill the device.
//
// A tensor has less than 2^31 − 256 pixels, and an image less than 2^31 elements.

#pragma once

#include "async_copy.cuh"
#include "mma.cuh"
#include "on_load.cuh"
#include "statistics.cuh"

template <typename T>
constexpr bool IS_FLOAT = false;
template <>
constexpr bool IS_FLOAT<float> = true;

/// A where CHOICE holds, else B.
template <bool CHOICE, typename A, typename B>
struct Either {
    using Type = A;
};
template <typename A, typename B>
struct Either<false, A, B> {
    using Type = B;
};

/// The launch's block has one dimension.
__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }

/// Threads of a block: warps of 64x32 sums, or four where that would be fewer.
constexpr __device__ int gemm_threads(int tile_m, int tile_n) {
    return tile_m * tile_n > 64 * 32 * 4 ? tile_m * tile_n / 64 : 128;
}

/// Blocks that a multiprocessor is to have room for. Some hide each other's barriers; below 8.0 fragments and staged tiles, and
/// everywhere the gathering of single elements, take more registers than that would leave.
template <int TILE_M, int TILE_N, bool VECTOR>
constexpr int MIN_BLOCKS = !VECTOR || ARCH < 800        ? 1
                           : TILE_M * TILE_N == 128 * 64 ? 3
                                                         : 512 / gemm_threads(TILE_M, TILE_N);

/// Where an element of an operand lies, and whether it is stored: what is not reads as zero. A null pointer would say the same, but be
/// compared again for every vector.
template <typename T>
struct Place {
    const T* at;
    bool stored;
};

/// A matrix as an operand: its rows are the lines. `Form` makes what is multiplied of what is stored, by channel, which
/// is the position in a line.
template <typename T, class Form = AsStored>
struct Matrix {
    using Element = T;
    using Line = int;
    using Position = int;
    using OnLoad = Form;
    static constexpr bool REUSED = false;

    const T* data;   // [lines, stride]
    int lines;       // lines from this one on read as zero
    int length;      // elements from this one on read as zero
    int stride;
    Form form;

    __device__ __forceinline__ Line line(int index) const { return index; }
    __device__ __forceinline__ Position position(int index) const { return index; }
    __device__ __forceinline__ void advance_line(Line& line, int step) const { line += step; }
    __device__ __forceinline__ void advance(Position& position, int step) const { position += step; }

    __device__ __forceinline__ Place<T> at(Line line, Position position) const {
        const i64 bytes = wide_product(line, stride * static_cast<int>(sizeof(T)));
        return {behind(data + position, bytes), line < lines && position < length};
    }
};

/// The line that is staged as number `at`: of each 32, those that a lane has in `lane_row` are neighbours. The function
/// is its own inverse.
__device__ __forceinline__ int permuted(int at) { return at / 32 * 32 + at % 8 / 2 * 8 + at % 32 / 8 * 2 + at % 2; }

/// Brings LINES lines of LENGTH elements at a time into shared memory, LD elements apart, and walks along the lines or,
/// with ACROSS, from lines to later lines. A thread has the same position in each of its lines. With PERMUTED, lines are
/// staged in the order of `permuted`.
template <class Operand, int LINES, int LENGTH, int LD, bool ACROSS, int THREADS, bool VECTOR, bool PERMUTED = false>
struct Stager {
    using T = typename Operand::Element;
    static constexpr int N = VECTOR_LEN<T>;
    static constexpr int PER_LINE = LENGTH / N;
    static constexpr int APART = THREADS / PER_LINE;
    static constexpr int COUNT = (LINES + APART - 1) / APART;
    static_assert(LENGTH % N == 0 && THREADS % PER_LINE == 0, "threads share a line evenly");
    static_assert(!PERMUTED || !ACROSS, "lines that change keep their order");

    // A vector is moved as one word: one of small elements is taken apart and put together again where it may be zero,
    // which needs its load to have ended.
    using Word = ::Word<16>::Type;

    const Operand operand;
    typename Operand::Line lines[COUNT];
    typename Operand::Position position;
    typename Either<VECTOR, Word, Vector<T, N>>::Type staged[COUNT];

    // Where the thread's first vector lies in a tile.
    const int first_slot = opaque(tile_line(0) * LD + tile_vector() * N);

    // What the thread's vectors are formed with: their channels, which of them there are, and the same vectors of the
    // second tensor.
    using OnLoad = typename Operand::OnLoad;
    static constexpr bool FORMS = OnLoad::FORMS;
    int channel;
    u32 present;
    Word second[OnLoad::READS_TWO ? COUNT : 1];

    __device__ __forceinline__ explicit Stager(const Operand& operand) : operand(operand) {}

    __device__ __forceinline__ Stager(const Operand& operand, int first_line, int first_position) : operand(operand) {
        go_to(first_line, first_position);
    }

    /// Goes to the tile that begins there.
    __device__ __forceinline__ void go_to(int first_line, int first_position) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int at = tile_line(i);
            lines[i] = operand.line(first_line + (PERMUTED ? permuted(at) : at));
        }
        position = operand.position(first_position + tile_vector() * N);
    }

    // Eight neighbouring lanes store at a time. They are given eight lines, which lie in distinct banks; the same vectors
    // of fewer lines would not.
    static constexpr int WARP_LINES = PER_LINE < 8 ? WARP_SIZE / PER_LINE : 1;

    /// The tile's line of the thread's vector i.
    __device__ __forceinline__ static int tile_line(int i) {
        const int lane = lane_in_warp(), warp = thread_index() / WARP_SIZE;
        const int first = PER_LINE < 8 ? warp * WARP_LINES + lane % WARP_LINES : thread_index() / PER_LINE;
        return first + i * APART;
    }

    /// Which vector of its lines a thread has.
    __device__ __forceinline__ static int tile_vector() {
        return PER_LINE < 8 ? lane_in_warp() / WARP_LINES : thread_index() % PER_LINE;
    }

    /// Whether the tile has the thread's vector i.
    __device__ __forceinline__ static bool has(int i) { return (i + 1) * APART <= LINES || tile_line(i) < LINES; }

    /// Goes on to the next tile.
    __device__ __forceinline__ void advance() {
        if constexpr (ACROSS) {
#pragma unroll
            for (int i = 0; i < COUNT; i++) operand.advance_line(lines[i], LINES);
        } else {
            operand.advance(position, LENGTH);
        }
    }

    /// Where the thread's vector i lies in the tile.
    __device__ __forceinline__ T* slot(T* tile, int i) const {
        return tile + first_slot + i * APART * LD;
    }

    /// Starts copying a tile.
    __device__ __forceinline__ void copy(T* tile) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (!has(i)) continue;
            const Place<T> from = operand.at(lines[i], position);
            copy_async_16<Operand::REUSED>(slot(tile, i), from.at, from.stored);
        }
        advance();
    }

    /// Loads a tile into registers.
    __device__ __forceinline__ void fetch() {
        if constexpr (VECTOR) {
            if constexpr (FORMS) look_up();
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                const Place<T> from = operand.at(lines[i], position);
                staged[i] = Word{};
                if (from.stored && has(i)) staged[i] = load_vector<Word, 1>(reinterpret_cast<const Word*>(from.at))[0];
            }
        } else {
            typename Operand::Position element = position;
#pragma unroll
            for (int e = 0; e < N; e++) {
#pragma unroll
                for (int i = 0; i < COUNT; i++) {
                    const Place<T> from = operand.at(lines[i], element);
                    staged[i][e] = from.stored && has(i) ? formed(from.at, element) : T{};
                }
                operand.advance(element, 1);
            }
        }
        advance();
    }

    /// The element of a pointer, formed.
    __device__ __forceinline__ T formed(const T* from, typename Operand::Position at) const {
        if constexpr (FORMS) {
            if (operand.form.active()) {
                float value[1] = {to_float(*from)}, other[1] = {};
                if constexpr (OnLoad::READS_TWO) other[0] = to_float(operand.form.y[from - operand.data]);
                operand.form.form(value, other, at);
                return from_float<T>(value[0]);
            }
        }
        return *from;
    }

    /// Finds out what the vectors of the present tile are formed with.
    __device__ __forceinline__ void look_up() {
        if (!operand.form.active()) return;
        channel = position;
        present = 0;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const Place<T> from = operand.at(lines[i], position);
            if (!from.stored || !has(i)) continue;
            present |= 1u << i;
            if constexpr (OnLoad::READS_TWO) {
                const T* other = operand.form.y + (from.at - operand.data);
                second[i] = load_vector<Word, 1>(reinterpret_cast<const Word*>(other))[0];
            }
        }
    }

    /// Forms the thread's vectors of a tile where they lie, with what was looked up.
    __device__ __forceinline__ void form(T* tile) const {
        if (!operand.form.active()) return;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if ((present >> i & 1u) == 0) continue;
            float values[N], others[N] = {};
            load_floats<N>(slot(tile, i), values);
            if constexpr (OnLoad::READS_TWO) word_floats(second[i], others);
            operand.form.form(values, others, channel);
            store_floats<N>(slot(tile, i), values);
        }
    }

    /// The elements of a word, widened.
    __device__ __forceinline__ static void word_floats(const Word& word, float (&out)[N]) {
        const u32 words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
        for (int i = 0; i < N; i++) {
            if constexpr (IS_FLOAT<T>) {
                out[i] = __uint_as_float(words[i]);
            } else {
                out[i] = to_float(T{static_cast<u16>(words[i / 2] >> i % 2 * 16)});
            }
        }
    }

    /// Stores the registers into a tile, formed.
    __device__ __forceinline__ void deposit(T* tile) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (!has(i)) continue;
            if constexpr (!VECTOR) {
                store_vector<T, N>(slot(tile, i), staged[i]);
            } else {
                if constexpr (FORMS) {
                    if (operand.form.active() && (present >> i & 1u) != 0) {
                        float values[N], others[N] = {};
                        word_floats(staged[i], values);
                        if constexpr (OnLoad::READS_TWO) word_floats(second[i], others);
                        operand.form.form(values, others, channel);
                        store_floats<N>(slot(tile, i), values);
                        continue;
                    }
                }
                store_vector<Word, 1>(reinterpret_cast<Word*>(slot(tile, i)), {{staged[i]}});
            }
        }
    }
};

/// Where a column of a row lies in a slice of sums. Blocks of 16 columns trade places in every other four rows, and blocks of
/// four where that lets eight lanes read eight columns each: what lanes store and read at a time lies in distinct banks.
__device__ __forceinline__ int slice_column(int row, int column) {
    return column ^ ((row & 4) << 2) ^ ((((column >> 5) ^ row) & 1) << 2);
}

/// Sums of a tile in tensor-core accumulators: a warp has 32 columns and as many rows as its share comes to. They leave
/// through shared memory in slices, each of 16 rows of every warp.
template <typename T, int TILE_M, int TILE_N, Major A, Major B, int LD_A, int LD_B,
          int THREADS = gemm_threads(TILE_M, TILE_N)>
struct TensorSums {
    static constexpr int WARPS_N = TILE_N / 32;
    static constexpr int WARPS_M = THREADS / WARP_SIZE / WARPS_N;
    static constexpr int WARP_M = TILE_M / WARPS_M;
    static constexpr int SLICES = WARP_M / 16, SLICE_ROWS = WARPS_M * 16;

    using Left = FragmentA<T, A>;
    using Right = FragmentB<T, B>;

    Accumulator sums[SLICES][2];

    __device__ __forceinline__ static int warp() { return thread_index() / WARP_SIZE; }
    __device__ __forceinline__ static int first_row() { return warp() / WARPS_N * WARP_M; }
    __device__ __forceinline__ static int first_column() { return warp() % WARPS_N * 32; }

    /// Whether the warp has one of the first `rows`.
    __device__ __forceinline__ static bool reaches(int rows) { return first_row() < rows; }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < SLICES; i++) {
            zero(sums[i][0]);
            zero(sums[i][1]);
        }
    }

    /// Where a lane begins to read a tile of A, and one of B.
    __device__ __forceinline__ static int left_at() {
        return first_row() * (A == Major::Row ? LD_A : 1) + Left::lane_offset(LD_A);
    }
    __device__ __forceinline__ static int right_at() {
        return first_column() * (B == Major::Row ? 1 : LD_B) + Right::lane_offset(LD_B);
    }

    /// Adds the products of tiles, given from `left_at` and `right_at` on.
    template <int TILE_K>
    __device__ __forceinline__ void accumulate(const T* a, const T* b) {
#pragma unroll
        for (int k = 0; k < TILE_K; k += 16) {
            Right right[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                load(right[j], B == Major::Row ? b + k * LD_B + 16 * j : b + 16 * j * LD_B + k, LD_B);
            }
#pragma unroll
            for (int i = 0; i < SLICES; i++) {
                Left left;
                load(left, A == Major::Row ? a + 16 * i * LD_A + k : a + k * LD_A + 16 * i, LD_A);
                mma(sums[i][0], left, right[0]);
                mma(sums[i][1], left, right[1]);
            }
        }
    }

    __device__ __forceinline__ void store_slice(int slice, float* shared, int ld) const {
        const int row = warp() / WARPS_N * 16 + first_row_of_lane(), column = first_column() + first_column_of_lane();
        float* const line = shared + row * ld;
        // Registers have no index at run time.
#pragma unroll
        for (int i = 0; i < SLICES; i++) {
            if (i != slice) continue;
            // The lane's other rows and columns differ from these in bits that `slice_column` leaves alone.
            store(line + slice_column(row, column), ld, sums[i][0]);
            store(line + slice_column(row, column + 16), ld, sums[i][1]);
        }
    }

    /// The row of the tile that is row `row` of a slice.
    __device__ __forceinline__ static int tile_row(int slice, int row) {
        return row / 16 * WARP_M + slice * 16 + row % 16;
    }
};

/// Sums of a tile of floats: 8 rows (fewer in a larger block) by 4 columns per thread. Where lines run along k, a thread's rows (or columns) are
/// interleaved with those of the other threads; else they come in fours. Either way its loads are vectors, and those of
/// eight threads fall into distinct banks.
template <int TILE_M, int TILE_N, Major A, Major B, int LD_A, int LD_B, int THREADS = gemm_threads(TILE_M, TILE_N)>
struct FloatSums {
    static constexpr int COLUMNS = 4, ROWS = TILE_M * TILE_N / THREADS / COLUMNS;
    static constexpr int THREADS_M = TILE_M / ROWS, THREADS_N = TILE_N / COLUMNS;
    static constexpr int SLICES = 1, SLICE_ROWS = TILE_M;
    static_assert(THREADS_M * THREADS_N == THREADS && (ROWS % 4 == 0 || A == Major::Row), "threads share a tile evenly");

    float sums[ROWS][COLUMNS];

    __device__ __forceinline__ static int thread_m() { return thread_index() / THREADS_N; }
    __device__ __forceinline__ static int thread_n() { return thread_index() % THREADS_N; }

    /// The tile's row or column that is number i of a thread.
    template <bool ALONG_K, int ALONG>
    __device__ __forceinline__ static int index(int thread, int i) {
        return ALONG_K ? thread + i * ALONG : (thread + i / 4 * ALONG) * 4 + i % 4;
    }

    /// Whether the thread has one of the first `rows`.
    __device__ __forceinline__ static bool reaches(int rows) {
        return index<A == Major::Row, THREADS_M>(thread_m(), 0) < rows;
    }

    /// Loads a thread's elements at four values of k. ALONG threads share the rows, or the columns.
    template <bool ALONG_K, int ALONG, int COUNT>
    __device__ __forceinline__ static void load_four(float (&out)[COUNT][4], const float* tile, int ld, int thread,
                                                     int k) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int at = index<ALONG_K, ALONG>(thread, ALONG_K ? i : i / 4 * 4);
            const float* from = ALONG_K ? tile + at * ld + k : tile + (k + i % 4) * ld + at;
            const Vector<float, 4> four = load_vector<float, 4>(from);
#pragma unroll
            for (int j = 0; j < 4; j++) (ALONG_K ? out[i][j] : out[i / 4 * 4 + j][i % 4]) = four[j];
        }
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) sums[i][j] = 0.0f;
        }
    }

    __device__ __forceinline__ static int left_at() { return 0; }
    __device__ __forceinline__ static int right_at() { return 0; }

    template <int TILE_K>
    __device__ __forceinline__ void accumulate(const float* a, const float* b) {
#pragma unroll
        for (int k = 0; k < TILE_K; k += 4) {
            float left[ROWS][4], right[COLUMNS][4];
            load_four<A == Major::Row, THREADS_M>(left, a, LD_A, thread_m(), k);
            load_four<B == Major::Column, THREADS_N>(right, b, LD_B, thread_n(), k);
#pragma unroll
            for (int kk = 0; kk < 4; kk++) {
#pragma unroll
                for (int i = 0; i < ROWS; i++) {
#pragma unroll
                    for (int j = 0; j < COLUMNS; j++) sums[i][j] = fma_f(left[i][kk], right[j][kk], sums[i][j]);
                }
            }
        }
    }

    __device__ __forceinline__ void store_slice(int, float* shared, int ld) const {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int row = index<A == Major::Row, THREADS_M>(thread_m(), i);
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                const int column = index<B == Major::Column, THREADS_N>(thread_n(), j);
                shared[row * ld + slice_column(row, column)] = sums[i][j];
            }
        }
    }

    __device__ __forceinline__ static int tile_row(int, int row) { return row; }
};

/// Where a tile of C begins. Grid x counts the tiles with n innermost, so that neighbours share A in the cache.
struct Origin {
    int m, n;
};

/// The origin of the block's tile, C having `n_end` columns.
template <int TILE_M, int TILE_N>
__device__ __forceinline__ Origin tile_origin(int n_end) {
    const u32 tiles_n = divide_up(n_end, TILE_N);
    return {static_cast<int>(blockIdx.x / tiles_n) * TILE_M, static_cast<int>(blockIdx.x % tiles_n) * TILE_N};
}

/// Floats between the rows of a slice of sums.
constexpr __device__ int slice_stride(int tile_n) { return tile_n + 8; }

/// Shared memory of a slice.
template <class Sums, int TILE_N>
constexpr int slice_bytes = Sums::SLICE_ROWS * slice_stride(TILE_N) * 4;

/// Hands the sums of a tile below `m_end` and `n_end` to the writer in vectors of 16 bytes of its output, one by one without
/// VECTOR, AT_ONCE of them under way. They pass through `shared`, slice_bytes of it, so that a thread has neighbours of a row:
/// all threads take part.
template <int TILE_N, int THREADS, bool VECTOR, int AT_ONCE = 2, class Sums, class Writer>
__device__ __forceinline__ void write_slices(const Sums& sums, Writer& writer, Origin at, int m_end, int n_end,
                                             void* shared) {
    constexpr int N = VECTOR ? VECTOR_LEN<typename Writer::Output> : 1, PER_ROW = TILE_N / N, PART = N < 4 ? N : 4;
    constexpr int STRIDE = slice_stride(TILE_N), APART = THREADS / PER_ROW;
    static_assert(THREADS % PER_ROW == 0, "a thread has one column of all its rows");
    float* const slice = static_cast<float*>(shared);
    const int first = thread_index() / PER_ROW, column = thread_index() % PER_ROW * N, n = at.n + column;
#pragma unroll 1
    for (int s = 0; s < Sums::SLICES; s++) {
        __syncthreads();
        sums.store_slice(s, slice, STRIDE);
        __syncthreads();
#pragma unroll AT_ONCE
        for (int i = 0; i < divide_up(Sums::SLICE_ROWS, APART); i++) {
            const int row = first + i * APART, m = at.m + Sums::tile_row(s, row);
            if ((Sums::SLICE_ROWS % APART != 0 && row >= Sums::SLICE_ROWS) || m >= m_end || n >= n_end) continue;
            float values[N];
#pragma unroll
            for (int part = 0; part < N; part += PART) {
                // Rows eight apart have their columns in the same places.
                const int place = slice_column(APART % 8 == 0 ? first : row, column + part);
                const Vector<float, PART> loaded = load_vector<float, PART>(slice + row * STRIDE + place);
#pragma unroll
                for (int j = 0; j < PART; j++) values[part + j] = loaded[j];
            }
            writer.write(m, n, values);
        }
    }
}

/// Floats between the rows of sums over rows: two that are stored at a time lie in distinct banks.
constexpr __device__ int sums_stride(int tile_n) { return tile_n + 4; }

/// Adds two sums per column over the threads that have the column, and hands them to `take(column, first, second)` for every
/// column of the tile. A thread has COLUMNS neighbours from `column` on, as one of ROW_GROUPS. All threads of the block take
/// part; the last call of `write` is over. `shared` is `[2 · ROW_GROUPS, sums_stride]`.
template <int TILE_N, int ROW_GROUPS, int COLUMNS, class Take>
__device__ __forceinline__ void sum_columns(const float (&first)[COLUMNS], const float (&second)[COLUMNS], int group,
                                            int column, float* shared, Take take) {
    constexpr int STRIDE = sums_stride(TILE_N);
    __syncthreads();
    float* const to = shared + group * STRIDE + column;
    store_floats<COLUMNS>(to, first);
    store_floats<COLUMNS>(to + ROW_GROUPS * STRIDE, second);
    __syncthreads();
    const int mine = thread_index();
    if (mine >= TILE_N) return;
    float sums[2] = {};
#pragma unroll 4
    for (int from = 0; from < ROW_GROUPS; from++) {
        sums[0] += shared[from * STRIDE + mine];
        sums[1] += shared[(ROW_GROUPS + from) * STRIDE + mine];
    }
    take(mine, sums[0], sums[1]);
}

/// One block's product. A is Major::Row where its lines run along k, B is Major::Column where its lines do.
template <typename T, int TILE_M, int TILE_N, Major A, Major B, bool VECTOR>
struct Gemm {
    static constexpr int THREADS = gemm_threads(TILE_M, TILE_N);
    static constexpr int TILE_K = 64 / static_cast<int>(sizeof(T));
    static constexpr bool A_ALONG_K = A == Major::Row, B_ALONG_K = B == Major::Column;

    // One vector of padding per line puts what a warp reads at once in distinct banks.
    static constexpr int PADDING = VECTOR_LEN<T>;
    static constexpr int LINES_A = A_ALONG_K ? TILE_M : TILE_K, LENGTH_A = A_ALONG_K ? TILE_K : TILE_M;
    static constexpr int LINES_B = B_ALONG_K ? TILE_N : TILE_K, LENGTH_B = B_ALONG_K ? TILE_K : TILE_N;
    static constexpr int LD_A = LENGTH_A + PADDING, LD_B = LENGTH_B + PADDING;
    static constexpr int STAGE = LINES_A * LD_A + LINES_B * LD_B;

    // Three stages hide more latency, where 48 KiB have room for them.
    static constexpr bool ASYNC = VECTOR && ARCH >= 800;
    static constexpr int MOST_BYTES = 48 * 1024, ONE_BYTES = STAGE * static_cast<int>(sizeof(T));
    static constexpr int STAGES = ASYNC && 3 * ONE_BYTES <= MOST_BYTES ? 3 : 2;

    // Where a lane's columns are known, B's lines are staged so that they neighbour, and the sums need not pass through
    // shared memory.
    static constexpr bool DIRECT = ASYNC && !IS_FLOAT<T> && B_ALONG_K;

    using Sums = typename Either<IS_FLOAT<T>, FloatSums<TILE_M, TILE_N, A, B, LD_A, LD_B>,
                                 TensorSums<T, TILE_M, TILE_N, A, B, LD_A, LD_B>>::Type;
    template <class Operand>
    using StagerA = Stager<Operand, LINES_A, LENGTH_A, LD_A, !A_ALONG_K, THREADS, VECTOR>;
    template <class Operand>
    using StagerB = Stager<Operand, LINES_B, LENGTH_B, LD_B, !B_ALONG_K, THREADS, VECTOR, DIRECT>;

    // Sums that pass through shared memory do so after the last product.
    static constexpr int STAGE_BYTES = STAGES * ONE_BYTES;
    static constexpr int SLICE_BYTES = DIRECT ? 0 : slice_bytes<Sums, TILE_N>;
    static constexpr int SHARED_BYTES = STAGE_BYTES > SLICE_BYTES ? STAGE_BYTES : SLICE_BYTES;
    static_assert(SHARED_BYTES <= MOST_BYTES, "static shared memory");

    /// Where the lane reads a stage's tile of A, and that of B, reckoned once.
    struct Lane {
        int left = opaque(Sums::left_at()), right = opaque(LINES_A * LD_A + Sums::right_at());
    };

    Sums sums;

    /// The sums over k from `k_begin` up to `k_end`, `shared` being SHARED_BYTES. Elements past the ends of the
    /// operands read as zero.
    template <class OperandA, class OperandB>
    __device__ __forceinline__ void multiply(const OperandA& a, const OperandB& b, Origin at, int k_begin, int k_end,
                                             void* shared) {
        sums.clear();
        const int steps = divide_up(k_end - k_begin, TILE_K);
        if (steps <= 0) return;
        StagerA<OperandA> left(a, A_ALONG_K ? at.m : k_begin, A_ALONG_K ? k_begin : at.m);
        StagerB<OperandB> right(b, B_ALONG_K ? at.n : k_begin, B_ALONG_K ? k_begin : at.n);
        T* const tiles = static_cast<T*>(shared);
        if constexpr (ASYNC) {
            multiply_async(left, right, steps, tiles);
        } else {
            multiply_staged(left, right, steps, tiles);
        }
    }

    // Step i starts the copies of tile i and multiplies the tile that was started STAGES − 1 steps before. An operand
    // that is formed on load is formed in shared memory by the threads that copied it; what that takes is loaded while
    // the tile before is multiplied.
    template <class Left, class Right>
    __device__ __forceinline__ void multiply_async(Left& left, Right& right, int steps, T* tiles) {
        constexpr int AHEAD = STAGES - 1;
        const Lane lane;
        Left left_behind = left;
        Right right_behind = right;
        if constexpr (Left::FORMS) left_behind.look_up();
        if constexpr (Right::FORMS) right_behind.look_up();
        const auto start = [&](int step, int stage) {
            if (step < steps) {
                left.copy(tiles + stage * STAGE);
                right.copy(tiles + stage * STAGE + LINES_A * LD_A);
            }
            copy_async_commit();
        };
#pragma unroll
        for (int step = 0; step < AHEAD; step++) start(step, step);
        // Unrolled, the place of a stage is a constant. Larger tiles and floats have no registers left for that.
        constexpr int UNROLLED = THREADS < 256 && !IS_FLOAT<T> ? STAGES : 1;
        for (int step = 0; step < steps;) {
#pragma unroll
            for (int u = 0; u < UNROLLED; u++, step++) {
                if (step >= steps) break;
                const int stage = UNROLLED > 1 ? u : step % STAGES;
                copy_async_wait<AHEAD - 1>();
                if constexpr (Left::FORMS) form_and_go_on(left_behind, tiles + stage * STAGE);
                if constexpr (Right::FORMS) form_and_go_on(right_behind, tiles + stage * STAGE + LINES_A * LD_A);
                // After the barrier all copies of the tile have arrived, and no thread reads the previous tile any more.
                __syncthreads();
                start(step + AHEAD, stage == 0 ? STAGES - 1 : stage - 1);
                accumulate(tiles + stage * STAGE, lane);
            }
        }
    }

    template <class Side>
    __device__ __forceinline__ static void form_and_go_on(Side& side, T* tile) {
        side.form(tile);
        side.advance();
        side.look_up();
    }

    // The loads of tile i are under way while tile i − 1 is multiplied. With two stages one barrier per step is enough:
    // who is past it has left the products of the tile before.
    template <class Left, class Right>
    __device__ __forceinline__ void multiply_staged(Left& left, Right& right, int steps, T* tiles) {
        const Lane lane;
        int stage = 0;
        for (int step = 0; step <= steps; step++, stage ^= STAGE) {
            if (step < steps) {
                left.fetch();
                right.fetch();
            }
            if (step > 0) accumulate(tiles + (stage ^ STAGE), lane);
            if (step < steps) {
                left.deposit(tiles + stage);
                right.deposit(tiles + stage + LINES_A * LD_A);
                __syncthreads();
            }
        }
    }

    __device__ __forceinline__ void accumulate(const T* stage, const Lane& lane) {
        sums.template accumulate<TILE_K>(stage + lane.left, stage + lane.right);
    }

    /// Hands the sums below `m_end` and `n_end` to the writer in vectors of 16 bytes of its output, one by one without
    /// VECTOR.
    template <class Writer>
    __device__ __forceinline__ void write(Writer&& writer, Origin at, int m_end, int n_end, void* shared) const {
        if constexpr (DIRECT) {
            write_direct(writer, at, m_end, n_end);
        } else {
            write_slices<TILE_N, THREADS, VECTOR>(sums, writer, at, m_end, n_end, shared);
        }
    }

    template <class Writer>
    __device__ __forceinline__ void write_direct(Writer& writer, Origin at, int m_end, int n_end) const {
        const int n = at.n + Sums::first_column() + lane_in_warp() % 4 * 8;
        if (n >= n_end) return;
#pragma unroll
        for (int i = 0; i < Sums::SLICES * 2; i++) {
            const int m = at.m + Sums::first_row() + i * 8 + lane_in_warp() / 4;
            if (m >= m_end) continue;
            float values[8];
            lane_row(sums.sums[i / 2], i % 2, values);
            writer.write(m, n, values);
        }
    }

    // A writer of T has the same columns in all its rows, and with it as many threads as fit the block.
    static constexpr int COLUMNS = VECTOR ? VECTOR_LEN<T> : 1, ROW_GROUPS = THREADS * COLUMNS / TILE_N;
    static_assert((TILE_N + 2 * ROW_GROUPS * sums_stride(TILE_N)) * 4 <= SHARED_BYTES, "sums over rows pass through the tiles");

    /// The first column of the tile that a thread writes, and its place among those that write it, the first row's first.
    __device__ __forceinline__ static int written_column() {
        if constexpr (DIRECT) return Sums::first_column() + lane_in_warp() % 4 * 8;
        return thread_index() % (TILE_N / COLUMNS) * COLUMNS;
    }
    __device__ __forceinline__ static int row_group() {
        if constexpr (DIRECT) return thread_index() / WARP_SIZE / Sums::WARPS_N * 8 + lane_in_warp() / 4;
        return thread_index() / (TILE_N / COLUMNS);
    }

    /// Statistics of the columns of the result, of which a tile of m is a slab. This product's columns begin at `first_column` of
    /// the `c` that there are.
    __device__ __forceinline__ static void finish_moments(Moments<COLUMNS>& moments, Origin at, int m_end, int n_end,
                                                          const StatisticsOut& out, int c, int first_column,
                                                          void* shared) {
        float* const origins = static_cast<float*>(shared);
        __syncthreads();
        if (row_group() == 0) {
#pragma unroll
            for (int i = 0; i < COLUMNS; i++) origins[written_column() + i] = moments.origin[i];
        }
        __syncthreads();
        float origin[COLUMNS];
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) origin[i] = origins[written_column() + i];
        moments.move_to(origin);
        const float count = static_cast<float>(min_of(m_end - at.m, TILE_M));
        float* const to = out.partials + static_cast<i64>(at.m / TILE_M) * 2 * c + first_column + at.n;
        sum_columns<TILE_N, ROW_GROUPS>(moments.sums, moments.squares, row_group(), written_column(), origins + TILE_N,
                                        [&](int column, float sum, float squares) {
            if (at.n + column < n_end) store_moments(origins[column], sum, squares, count, to + column, c);
        });
        static_assert(COLUMNS * THREADS * 8 <= SHARED_BYTES, "sums over rows pass through the tiles");
        constexpr int LANES = TILE_N / COLUMNS;
        const int column = at.n + thread_index() % LANES * COLUMNS, tiles = divide_up(n_end, TILE_N);
        const ChannelTile tile{LANES, THREADS / LANES, thread_index() / LANES, first_column + column, column < n_end};
        const int index = static_cast<int>(blockIdx.z) * tiles + at.n / TILE_N;
        finish_statistics<THREADS, COLUMNS>(out, tile, index, at.m / TILE_M, divide_up(m_end, TILE_M), c, [&](int slab) {
            return static_cast<double>(min_of(m_end - slab * TILE_M, TILE_M));
        }, shared);
    }

    /// Writes the gradient sums of every column of the tile to `partials` `[tiles of m, 2, c]`, and where there is
    /// `scores` `[tiles]` the block's.
    __device__ __forceinline__ static void write_gradient_sums(const GradientSums<COLUMNS>& sums, Origin at, int n_end,
                                                               float* partials, float* scores, int c, void* shared) {
        float* const memory = static_cast<float*>(shared);
        float* const to = partials + static_cast<i64>(at.m / TILE_M) * 2 * c + at.n;
        sum_columns<TILE_N, ROW_GROUPS>(sums.sums, sums.products, row_group(), written_column(), memory,
                                        [&](int column, float sum, float product) {
            if (at.n + column >= n_end) return;
            to[column] = sum;
            to[c + column] = product;
        });
        if (scores == nullptr) return;
        __syncthreads();
        const float score = block_sum(sums.score, memory);
        if (thread_index() == 0) scores[blockIdx.x] = score;
    }
};
