//! Sums of two values.

use super::copy::CopyStep;
use super::cuda::elementwise;
use super::operation::{LoweredNode, OnnxOperator, Operation, mismatch, require};
use super::simd::vectorised;
use super::step::{Backward, Io, Step, Uses, ValueId, Work};
use super::team::each_chunk;
use crate::Result;
use crate::device::{View, ViewMut};
use crate::shape::Shape;

const BLOCK: usize = 1 << 14;

/// y = a + b.
pub fn forward(a: View<'_>, b: View<'_>, y: ViewMut<'_>) {
    require("a sum", [("a", a.len(), y.len()), ("b", b.len(), y.len())]);
    if let View::Gpu(a) = a {
        return elementwise::add(a, b.gpu(), &y.gpu());
    }
    let (a, b, y) = (a.host(), b.host(), y.host());
    each_chunk(y, BLOCK, |block, y| {
        let (a, b) = (&a[block * BLOCK..][..y.len()], &b[block * BLOCK..][..y.len()]);
        vectorised(
            #[inline(always)]
            || y.iter_mut().zip(a).zip(b).for_each(|((y, a), b)| *y = a + b),
        );
    });
}

/// A sum of two values.
#[derive(Debug)]
pub struct AddStep {
    /// What is added; both may be the same value.
    pub terms: [ValueId; 2],
    /// The sum.
    pub y: ValueId,
    /// Elements per image.
    pub len: usize,
}

impl Step for AddStep {
    fn describe(&self) -> String {
        "add".into()
    }

    fn uses(&self) -> Uses {
        Uses::new(self.terms, [self.y])
    }

    fn work(&self) -> Work {
        Work::vector(3 * self.len as u64)
    }

    fn run(&self, io: &mut Io<'_>) {
        let [a, b] = self.terms.map(|term| io.read(term));
        forward(a, b, io.write(self.y));
    }

    fn gradient(&self, to: &mut dyn Backward) {
        let Some(from) = to.stored(self.y) else { return };
        // One term after the other: both may be the same value.
        for term in self.terms {
            if let Some(sink) = to.sink(term) {
                to.push(Box::new(CopyStep { from, to: sink, len: self.len }));
            }
        }
    }
}

/// The sum of two values of one shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Add;

impl Operation for Add {
    fn arity(&self) -> usize {
        2
    }

    fn output_shape(&self, name: &str, inputs: &[Shape]) -> Result<Shape> {
        if inputs[0] == inputs[1] { Ok(inputs[0]) } else { mismatch(name, inputs[0].to_string(), inputs[1]) }
    }

    fn describe(&self) -> String {
        "add".into()
    }

    fn lower(&self, node: &mut dyn LoweredNode) -> Result<Vec<Box<dyn Step>>> {
        let terms = [node.input(0), node.input(1)];
        Ok(vec![Box::new(AddStep { terms, y: node.output(), len: node.output_shape().len() })])
    }

    fn onnx(&self) -> Option<OnnxOperator> {
        Some(OnnxOperator::bare("Add"))
    }
}
