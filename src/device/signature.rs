//! The parameters of a kernel's instance as its file declares them, checked against the arguments of a launch.

use super::argument::{Argument, Element, Kind};
use super::scan::{KernelFunction, Parameter};
use crate::dtype::Dtype;
use crate::{Error, Result};

/// The parameters of one instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature(Vec<Expected>);

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Expected {
    name: &'static str,
    kind: Kind,
    nullable: bool,
}

impl Signature {
    /// That of an instance, whose template arguments take the places of the template's parameters.
    ///
    /// # Errors
    /// A type that no argument has, which is a fault of the kernel's file.
    pub fn new(kernel: &'static KernelFunction, instance: &'static str) -> Result<Self> {
        let arguments = instance.split_once('<').map_or("", |(_, rest)| rest.trim_end_matches('>'));
        let arguments: Vec<&'static str> = arguments.split(',').map(str::trim).collect();
        let resolve = |of: &'static str| -> &'static str {
            let at = kernel.template.iter().position(|name| name == of);
            at.and_then(|at| arguments.get(at).copied()).unwrap_or(of)
        };
        let expected = |p: &'static Parameter| {
            let of = resolve(&p.of);
            let kind = match p.pointer {
                true => Some(Kind::Pointer { to: Some(element(of)), writable: p.writable }),
                false => value(of),
            };
            let unknown = || Error::Device(format!("{instance}: no launch can give `{of} {}`", p.name));
            Ok(Expected { name: &p.name, kind: kind.ok_or_else(unknown)?, nullable: p.nullable })
        };
        kernel.parameters.iter().map(expected).collect::<Result<_>>().map(Self)
    }

    /// Checks that a launch has as many arguments as the kernel has parameters, each of the parameter's type.
    ///
    /// # Errors
    /// Names the first argument that does not fit, what was expected and what came.
    pub fn check(&self, arguments: &[Argument]) -> Result<()> {
        if arguments.len() != self.0.len() {
            let names: Vec<&str> = self.0.iter().map(|e| e.name).collect();
            let (count, got) = (self.0.len(), arguments.len());
            return Err(Error::Device(format!("takes {count} arguments ({}), got {got}", names.join(", "))));
        }
        for (at, (expected, got)) in (1..).zip(self.0.iter().zip(arguments)) {
            let told = |came: String| {
                let Expected { name, kind, .. } = expected;
                Err(Error::Device(format!("argument {at}, {name}, is {kind}, got {came}")))
            };
            if !got.kind().fits(expected.kind) {
                return told(got.kind().to_string());
            }
            if got.is_null() && !expected.nullable {
                return told("a null pointer, which it is not said to take".into());
            }
        }
        Ok(())
    }
}

fn element(of: &'static str) -> Element {
    match of {
        "float" => Element::Number(Dtype::F32),
        "f16" => Element::Number(Dtype::F16),
        "bf16" => Element::Number(Dtype::Bf16),
        "double" => Element::F64,
        "int" => Element::I32,
        "u8" | "unsigned char" => Element::U8,
        "u32" | "unsigned" | "unsigned int" => Element::U32,
        "u64" | "unsigned long long" => Element::U64,
        name => Element::Struct(name, 0),
    }
}

/// The kind of a parameter that is no pointer: a number, or a struct, whose name begins with a capital letter.
fn value(of: &'static str) -> Option<Kind> {
    Some(match of {
        "float" => Kind::F32,
        "double" => Kind::F64,
        "int" => Kind::I32,
        "long long" | "i64" => Kind::I64,
        "u32" | "unsigned" | "unsigned int" => Kind::U32,
        "u64" | "unsigned long long" => Kind::U64,
        name if name.starts_with(|c: char| c.is_ascii_uppercase()) => Kind::Struct(name, 0),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::source::{Unit, files};

    fn signature(instance: &'static str) -> Signature {
        Signature::new(Unit::of(instance).unwrap().file().kernel(instance), instance).unwrap()
    }

    #[test]
    fn every_instance_has_a_signature() {
        for file in files().unwrap() {
            for instance in &file.instances {
                assert!(!Signature::new(file.kernel(instance), instance).unwrap().0.is_empty());
            }
        }
    }

    #[test]
    fn a_launch_that_does_not_fit_is_told() {
        let add = signature("add<f16, true>");
        let half = Element::Number(Dtype::F16);
        let (read, write) = (Argument::pointer(256, half, false), Argument::pointer(512, half, true));
        add.check(&[read, read, write, 7i64.into()]).unwrap();
        add.check(&[write, read, write, 7i64.into()]).unwrap();
        let refused = |arguments: &[Argument]| add.check(arguments).unwrap_err().to_string();
        assert_eq!(refused(&[read, read, write]), "device: takes 4 arguments (a, b, z, n), got 3");
        let said = |at: usize, argument: Argument| {
            let mut arguments = [read, read, write, 7i64.into()];
            arguments[at] = argument;
            refused(&arguments)
        };
        assert_eq!(said(3, 7i32.into()), "device: argument 4, n, is long long, got int");
        assert_eq!(said(2, read), "device: argument 3, z, is f16*, got const f16*");
        let float = Argument::pointer(256, Element::Number(Dtype::F32), true);
        assert_eq!(said(0, float), "device: argument 1, a, is const f16*, got float*");
        assert_eq!(said(1, 256u64.into()), "device: argument 2, b, is const f16*, got u64");
        assert!(said(1, Argument::null()).contains("argument 2, b, is const f16*, got a null pointer"));
    }

    #[test]
    fn structs_are_told_apart_by_name() {
        let finish = signature("loss_finish");
        let float = Element::Number(Dtype::F32);
        let sums = |name| Argument::pointer(256, Element::Struct(name, 24), true);
        let arguments = |name| {
            let losses = Argument::pointer(256, float, false);
            [losses, Argument::null(), sums(name), 1i32.into(), 1f64.into(), 1i32.into()]
        };
        finish.check(&arguments("LossSums")).unwrap();
        assert!(finish.check(&arguments("OptimizerState")).unwrap_err().to_string().contains("LossSums*"));
    }
}
