//! Lists whose memory the thread that drops them keeps for the next ones, so that a steady pass asks the system for none.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// What lists are of.
pub(super) trait Reusable: Copy + Default + 'static {
    /// Calls `body` with the memory that this thread has and nobody uses; not while the thread ends.
    fn with_free<R>(body: impl FnOnce(&mut Vec<Vec<Self>>) -> R) -> Option<R>;
}

macro_rules! reusable {
    ($($of:ty),*) => {$(
        impl Reusable for $of {
            fn with_free<R>(body: impl FnOnce(&mut Vec<Vec<Self>>) -> R) -> Option<R> {
                thread_local! { static FREE: RefCell<Vec<Vec<$of>>> = const { RefCell::new(Vec::new()) }; }
                FREE.try_with(|free| body(&mut free.borrow_mut())).ok()
            }
        }
    )*};
}

reusable!(f32, f64, usize);

/// A list in such memory.
pub(super) struct Reused<T: Reusable>(Vec<T>);

impl<T: Reusable> Reused<T> {
    /// So many zeros.
    pub fn zeros(len: usize) -> Self {
        let mut list = Self::with_room(len);
        list.0.resize(len, T::default());
        list
    }

    /// An empty list with room for so many elements: in the first memory that has it.
    fn with_room(len: usize) -> Self {
        if len == 0 {
            return Self(Vec::new());
        }
        let found = T::with_free(|free| {
            let at = free.iter().position(|list| list.capacity() >= len).or(free.len().checked_sub(1))?;
            Some(free.swap_remove(at))
        });
        let mut list = found.flatten().unwrap_or_default();
        list.clear();
        list.reserve(len);
        Self(list)
    }
}

impl<T: Reusable> FromIterator<T> for Reused<T> {
    fn from_iter<I: IntoIterator<Item = T>>(elements: I) -> Self {
        let elements = elements.into_iter();
        let mut list = Self::with_room(elements.size_hint().0);
        list.0.extend(elements);
        list
    }
}

impl<T: Reusable> Deref for Reused<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Reusable> DerefMut for Reused<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

impl<T: Reusable> Drop for Reused<T> {
    fn drop(&mut self) {
        let list = std::mem::take(&mut self.0);
        if list.capacity() > 0 {
            T::with_free(|free| free.push(list));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_and_lists_start_anew() {
        let mut first = Reused::<f32>::zeros(100);
        let second: Reused<f32> = [1.0, 2.0].into_iter().collect();
        first.fill(7.0);
        let (long, short) = (first.as_ptr(), second.as_ptr());
        drop(second);
        drop(first);
        let again = Reused::<f32>::zeros(80);
        assert_eq!((again.as_ptr(), &again[..]), (long, &[0.0; 80][..]));
        let other: Reused<f32> = [3.0].into_iter().collect();
        assert_eq!((other.as_ptr(), &other[..]), (short, &[3.0][..]));
        assert!(Reused::<f64>::zeros(0).is_empty());
    }
}
