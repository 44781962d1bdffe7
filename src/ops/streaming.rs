//! Results that are written past the caches: of what no cache can hold until it is read, each line would otherwise be read from
//! memory first, only to be replaced.

use pulp::{Simd, WithSimd};

use super::simd::dispatch;

/// Elements of a result from which on it is written past the caches.
const STREAMED: usize = 1 << 20;

/// Whether a result of so many elements is written past the caches.
pub(super) fn is_streamed(elements: usize) -> bool {
    elements >= STREAMED
}

/// The same of an input's gradient, if there is one; not where it is added to what is there.
pub(super) fn is_gradient_streamed(dx: Option<&(&mut [f32], bool)>) -> bool {
    dx.is_some_and(|(dx, accumulate)| !accumulate && is_streamed(dx.len()))
}

/// Copies past the caches.
pub(super) fn copy(from: &[f32], to: &mut [f32]) {
    struct Copy<'a>(&'a [f32], &'a mut [f32]);
    impl WithSimd for Copy<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            let Copy(from, to) = self;
            assert_eq!(from.len(), to.len(), "a copy of another length");
            let head = to.as_ptr().align_offset(size_of::<S::f32s>()).min(to.len());
            let ((from_head, from), (to_head, to)) = (from.split_at(head), to.split_at_mut(head));
            to_head.copy_from_slice(from_head);
            let ((from, from_rest), (to, to_rest)) = (S::as_simd_f32s(from), S::as_mut_simd_f32s(to));
            for (from, to) in from.iter().zip(to) {
                // SAFETY: the head ends where a vector is aligned.
                unsafe { store::<S>(to, *from) }
            }
            to_rest.copy_from_slice(from_rest);
        }
    }
    dispatch(Copy(from, to));
    finish();
}

/// Whether vectors can be [stored](store) in a result whose rows have so many elements.
#[inline(always)]
pub(super) fn is_aligned<S: Simd>(to: &[f32], row: usize) -> bool {
    row.is_multiple_of(S::F32_LANES) && to.as_ptr().align_offset(size_of::<S::f32s>()) == 0
}

/// Writes a vector past the caches.
///
/// # Safety
/// `to` is valid, and aligned to the size of a vector. Before it is read, by whomever, [`finish`] is called.
#[inline(always)]
pub(super) unsafe fn store<S: Simd>(to: *mut S::f32s, vector: S::f32s) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__m256, __m512, _mm256_stream_ps, _mm512_stream_ps};
        // SAFETY: a vector of this size is one of these, whose instructions are there where vectors are so long.
        unsafe {
            match size_of::<S::f32s>() {
                64 => return _mm512_stream_ps(to.cast(), std::mem::transmute_copy::<S::f32s, __m512>(&vector)),
                32 => return _mm256_stream_ps(to.cast(), std::mem::transmute_copy::<S::f32s, __m256>(&vector)),
                _ => (),
            }
        }
    }
    // SAFETY: promised by the caller.
    unsafe { to.write(vector) }
}

/// Ends what was written past the caches: it is in memory before anything that the thread writes from now on.
#[inline(always)]
pub(super) fn finish() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: an instruction that every processor of this architecture has.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
