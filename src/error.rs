//! The one error type of the library: what was expected, what came, and what to do about it.

use std::path::{Path, PathBuf};

/// What helps where memory runs out.
pub(crate) const MEMORY_REMEDY: &str = "give smaller batches or images, or allow the process more memory";

/// A `Result` whose error is [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong in the library. Each message is one line and ends with a remedy where there is one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused to read or write a path.
    #[error("{}: {reason}", path.display())]
    Io {
        /// The file or folder in question.
        path: PathBuf,
        /// What the operating system said. The message says it already, so it is no `source`: whoever prints the chain of
        /// causes would print it twice.
        reason: std::io::Error,
    },
    /// A file was readable but its content is not what its kind demands.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file in question.
        path: PathBuf,
        /// What is wrong with it and what to do.
        problem: String,
    },
    /// A graph, or a graph and its weights, do not fit together.
    #[error("graph: {0}")]
    Graph(String),
    /// Shapes given to an operation do not agree.
    #[error("{op}: expected {expected}, got {got}")]
    Shape {
        /// The operation or node.
        op: String,
        /// The shape or relation that was expected.
        expected: String,
        /// What came instead.
        got: String,
    },
    /// A merge was asked for that would not be exact.
    #[error("merge refused: {0}")]
    Merge(String),
    /// A setting is unknown, out of range or contradicts another.
    #[error("config: {0}")]
    Config(String),
    /// Labels or images of a dataset are unusable.
    #[error("data: {0}")]
    Data(String),
    /// A run could be carried out but would not mean what it seems to, and it was asked to be refused then.
    #[error("{0} (an error with --strict, otherwise a warning)")]
    Doubt(String),
    /// Training produced a value that is not finite.
    #[error("{0}")]
    NotFinite(String),
    /// What the input asks for does not fit into memory.
    #[error("out of memory: {0}; {remedy}", remedy = MEMORY_REMEDY)]
    Memory(String),
    /// A device was asked for that this machine or build does not have.
    #[error("device: {0}")]
    Device(String),
    /// A device failed in such a way that this process can use it no more.
    #[error("device: {0}")]
    DeviceLost(String),
    /// The user asked to stop; work was saved.
    #[error("interrupted; {0}")]
    Interrupted(String),
}

impl Error {
    /// Wraps an operating-system error with the path it concerns.
    pub fn io(path: impl AsRef<Path>, reason: std::io::Error) -> Self {
        let path = path.as_ref();
        match reason.kind() {
            std::io::ErrorKind::OutOfMemory => Self::Memory(format!("{} does not fit", path.display())),
            _ => Self::Io { path: path.to_owned(), reason },
        }
    }

    /// A file whose content is wrong.
    pub fn file(path: impl AsRef<Path>, problem: impl Into<String>) -> Self {
        Self::File { path: path.as_ref().to_owned(), problem: problem.into() }
    }

    /// Shapes that do not agree.
    pub fn shape(op: impl Into<String>, expected: impl Into<String>, got: impl Into<String>) -> Self {
        Self::Shape { op: op.into(), expected: expected.into(), got: got.into() }
    }
}
