//! Indices that cannot be taken for one another. Files hold them as plain numbers.

use std::fmt;
use std::ops::{Index, IndexMut, Range, RangeInclusive};

use serde::{Deserialize, Serialize};

/// Makes the type of one kind of index, which lists with an entry for each such thing take in brackets.
macro_rules! index {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(usize);

        impl $name {
            /// The index of the entry at this place of a list.
            pub const fn new(index: usize) -> Self {
                Self(index)
            }

            /// Its place in a list.
            pub const fn index(self) -> usize {
                self.0
            }

            /// The indices of a list of this length.
            pub fn all(len: usize) -> impl DoubleEndedIterator<Item = Self> + ExactSizeIterator {
                (0..len).map(Self)
            }

            /// The entries of a whole list with their indices.
            pub fn enumerate<T>(list: impl IntoIterator<Item = T>) -> impl Iterator<Item = (Self, T)> {
                list.into_iter().enumerate().map(|(index, entry)| (Self(index), entry))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl<T> Index<$name> for [T] {
            type Output = T;

            fn index(&self, at: $name) -> &T {
                &self[at.0]
            }
        }

        impl<T> IndexMut<$name> for [T] {
            fn index_mut(&mut self, at: $name) -> &mut T {
                &mut self[at.0]
            }
        }

        impl<T> Index<$name> for Vec<T> {
            type Output = T;

            fn index(&self, at: $name) -> &T {
                &self[at.0]
            }
        }

        impl<T> IndexMut<$name> for Vec<T> {
            fn index_mut(&mut self, at: $name) -> &mut T {
                &mut self[at.0]
            }
        }
    };
}

index! {
    /// Index of a value in its plan's table.
    ValueId
}

index! {
    /// Index of a parameter in [`crate::graph::Graph::params`].
    ParamId
}

index! {
    /// Index of a group of activations that are switched together: those of block b are site b, further sites follow.
    SiteId
}

index! {
    /// Index of a node, and of the one value it produces.
    NodeId
}

impl NodeId {
    /// The image that goes in, with which every graph begins.
    pub const INPUT: Self = Self(0);

    /// The node behind it.
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Nodes that lie one behind the other; files hold them as `start` and `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "Range<NodeId>", into = "Range<NodeId>")]
pub struct NodeRange {
    /// The first.
    pub start: NodeId,
    /// The one behind the last.
    pub end: NodeId,
}

impl NodeRange {
    /// Whether a node is one of them.
    pub fn contains(&self, id: &NodeId) -> bool {
        (self.start..self.end).contains(id)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.end.0.saturating_sub(self.start.0)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.start >= self.end
    }

    /// The last; `None` where there is none.
    pub fn last(&self) -> Option<NodeId> {
        self.iter().next_back()
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = NodeId> + ExactSizeIterator + use<> {
        (self.start.0..self.end.0).map(NodeId)
    }
}

impl From<Range<NodeId>> for NodeRange {
    fn from(Range { start, end }: Range<NodeId>) -> Self {
        Self { start, end }
    }
}

impl From<RangeInclusive<NodeId>> for NodeRange {
    fn from(nodes: RangeInclusive<NodeId>) -> Self {
        Self { start: *nodes.start(), end: nodes.end().next() }
    }
}

impl From<NodeRange> for Range<NodeId> {
    fn from(NodeRange { start, end }: NodeRange) -> Self {
        start..end
    }
}

impl<T> Index<NodeRange> for [T] {
    type Output = [T];

    fn index(&self, nodes: NodeRange) -> &[T] {
        &self[nodes.start.0..nodes.end.0]
    }
}

impl<T> Index<NodeRange> for Vec<T> {
    type Output = [T];

    fn index(&self, nodes: NodeRange) -> &[T] {
        &self[nodes.start.0..nodes.end.0]
    }
}

index! {
    /// Index of a block in [`crate::graph::Graph::blocks`].
    BlockId
}

impl BlockId {
    /// The site of the block's activations.
    pub const fn site(self) -> SiteId {
        SiteId(self.0)
    }
}
