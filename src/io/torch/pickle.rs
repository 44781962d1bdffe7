//! A reader of the pickles in `.pth` files: it builds values, never calls anything.
//!
//! Values lie in one list and refer to one another by index, so a pickle that is cyclic or nested a million deep costs
//! no more than its length and needs no recursion anywhere. Opcodes: Python's `pickletools`.
//!
//! Checkpoints hold more than tensors: counters, settings, random states, objects of the training script's own classes.
//! What a function or class that is not known here would have made is an [`Object`], of which only the class's name and the
//! items set on it are kept. Nobody asks what it is until a file turns out to hold no weights.

use std::collections::{BTreeMap, HashMap};

use super::Fault;
use super::storage_class::{STORAGES, StorageClass};
use super::view::{Storage, View};

/// Opcodes that are carried out and pairs that are copied at most; the state dict of a thousand layers takes about a
/// quarter of a million. Long files may take one more for each [`BYTES_PER_STEP`] of them: histories of losses lie beside
/// the weights.
const MAX_STEPS: usize = 1 << 20;
/// Makes the memory of values no more than a few times the file's size.
const BYTES_PER_STEP: usize = 16;
/// Longest key of a storage, and longest name of a class, in bytes. They are compared each time they are named.
const MAX_KEY_BYTES: usize = 256;
/// Dimensions of a tensor at most.
const MAX_DIMS: usize = 8;
/// Modules, and functions of Python itself, that no checkpoint names for its data. PyTorch's own safe loader refuses the
/// modules too.
const ATTACKS: [(&str, &[&str]); 10] = [
    ("os", &[]),
    ("posix", &[]),
    ("nt", &[]),
    ("sys", &[]),
    ("subprocess", &[]),
    ("runpy", &[]),
    ("socket", &[]),
    ("shutil", &[]),
    ("builtins", &FUNCTIONS),
    ("__builtin__", &FUNCTIONS),
];
const FUNCTIONS: [&str; 8] = ["eval", "exec", "execfile", "compile", "open", "input", "__import__", "breakpoint"];
const ONLY_TENSORS: &str = "only tensors are read and nothing in a pickle is run; save the state dict alone, `torch.save(model.state_dict(), path)`";

const AGAIN: &str = "make or download it again";

/// Index of a value.
pub(super) type Id = usize;
type Outcome<T> = Result<T, Fault>;

/// The value that stands for all of which nobody asks what they are.
const OTHER: Id = 0;

/// The functions and classes a pickle names.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    /// `torch.Size`, a tuple.
    Size,
    /// `torch._utils._rebuild_tensor` and its later versions.
    Tensor,
    /// `torch._utils._rebuild_parameter`, also with state, the class itself, and what else is its first argument.
    Parameter,
    /// `torch._tensor._rebuild_from_type_v2`, which calls one of the others: a tensor of a subclass or with attributes.
    FromType,
    Storage(&'static StorageClass),
    /// The class of a tensor, such as `torch.FloatTensor`, whose objects get their content as attributes: PyTorch's of 2017.
    TensorClass,
    /// Any other, by its place in [`Pickle::classes`]. Its objects are skipped.
    Other(usize),
}

impl Global {
    /// The one of this name, if tensors need it.
    fn find(module: &str, name: &str) -> Option<Self> {
        match (module, name) {
            ("collections", "OrderedDict") => Some(Self::OrderedDict),
            ("torch", "Size") => Some(Self::Size),
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3" | "_rebuild_qtensor") => {
                Some(Self::Tensor)
            }
            (
                "torch._utils",
                "_rebuild_parameter" | "_rebuild_parameter_with_state" | "_rebuild_device_tensor_from_cpu_tensor",
            )
            | ("torch.nn.parameter", "Parameter" | "Buffer") => Some(Self::Parameter),
            ("torch._tensor", "_rebuild_from_type_v2") => Some(Self::FromType),
            (
                "torch" | "torch.cuda",
                "Tensor" | "FloatTensor" | "HalfTensor" | "BFloat16Tensor" | "DoubleTensor" | "LongTensor"
                | "IntTensor" | "ShortTensor" | "CharTensor" | "ByteTensor" | "BoolTensor",
            ) => Some(Self::TensorClass),
            ("torch" | "torch.cuda" | "torch.storage", name) => {
                STORAGES.iter().find(|class| class.name == name).map(Self::Storage)
            }
            _ => None,
        }
    }
}

/// A class or function by its module and name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Class<'a> {
    pub module: &'a str,
    pub name: &'a str,
}

/// What some class or function would have made.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Object {
    /// Its place in [`Pickle::classes`].
    pub class: usize,
    /// The items set on it: a subclass of dict has them.
    pairs: Vec<(Id, Id)>,
}

/// A value of a pickle.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value<'a> {
    /// `None`, flags, floats, bytes, sets: what no tensor needs.
    Other,
    Int(i64),
    /// Little-endian bytes of an integer beyond 64 bits, as the old form's magic number is.
    Long(&'a [u8]),
    Text(&'a str),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    /// By its key.
    Storage(&'a str),
    Tensor(Box<View<'a>>),
    /// An object of a tensor's class before it has its content.
    EmptyTensor,
    Object(Box<Object>),
}

/// What a pickle holds.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    values: Vec<Value<'a>>,
    root: Id,
    /// Every storage that was named, by key.
    pub storages: BTreeMap<&'a str, Storage<'a>>,
    /// The classes of objects.
    pub classes: Vec<Class<'a>>,
}

impl<'a> Pickle<'a> {
    /// Reads one pickle from the front of `bytes`; also how many bytes it takes.
    ///
    /// # Errors
    /// An opcode that state dicts do not need, a function that only an attack names, or a pickle that is damaged.
    pub fn read(bytes: &'a [u8]) -> Outcome<(Self, usize)> {
        let left = MAX_STEPS + bytes.len() / BYTES_PER_STEP;
        let mut machine = Machine { bytes, left, values: vec![Value::Other], ..Machine::default() };
        loop {
            if let Some(root) = machine.step()? {
                let Machine { values, storages, classes, at, .. } = machine;
                return Ok((Self { values, root, storages, classes }, at));
            }
        }
    }

    /// The value the pickle stands for.
    pub fn root(&self) -> Id {
        self.root
    }

    pub fn value(&self, id: Id) -> &Value<'a> {
        &self.values[id]
    }

    /// The pairs of a dict, or those set on an object; none of anything else.
    pub fn entries(&self, id: Id) -> impl Iterator<Item = (&Value<'a>, Id)> {
        let pairs: &[(Id, Id)] = match &self.values[id] {
            Value::Dict(pairs) => pairs,
            Value::Object(object) => &object.pairs,
            _ => &[],
        };
        pairs.iter().map(|&(key, value)| (&self.values[key], value))
    }

    /// The items of a list; none of anything else.
    pub fn items(&self, id: Id) -> impl Iterator<Item = &Value<'a>> {
        let items: &[Id] = if let Value::List(items) = &self.values[id] { items } else { &[] };
        items.iter().map(|&id| &self.values[id])
    }
}

#[derive(Default)]
struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Steps that may still be taken.
    left: usize,
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack where marks were set.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    storages: BTreeMap<&'a str, Storage<'a>>,
    classes: Vec<Class<'a>>,
    /// Where each class lies in that list.
    known_classes: HashMap<Class<'a>, usize>,
}

impl<'a> Machine<'a> {
    /// Carries out one opcode; the result when it was the last.
    #[expect(clippy::too_many_lines, reason = "a table of opcodes, one arm each")]
    fn step(&mut self) -> Outcome<Option<Id>> {
        self.spend(1)?;
        let opcode = self.take(1)?[0];
        match opcode {
            0x80 => drop(self.take(1)?), // PROTO
            0x95 => drop(self.take(8)?), // FRAME
            b'.' => return self.pop().map(Some),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_to_mark()?),
            b'N' | 0x88 | 0x89 | 0x8f => self.push_other(), // NONE, NEWTRUE, NEWFALSE, EMPTY_SET
            b'G' => self.skip(8)?,
            b'K' => self.push_int::<1>()?,
            b'M' => self.push_int::<2>()?,
            b'J' => {
                let int = i32::from_le_bytes(self.array()?);
                self.push(Value::Int(i64::from(int)));
            }
            0x8a => self.push_long::<1>()?,
            0x8b => self.push_long::<4>()?,
            b'X' | b'T' => self.push_text::<4>()?, // BINUNICODE, Python 2's BINSTRING
            0x8c | b'U' => self.push_text::<1>()?, // SHORT_BINUNICODE, Python 2's SHORT_BINSTRING
            0x8d => self.push_text::<8>()?,
            b'B' => self.push_bytes::<4>()?,
            b'C' => self.push_bytes::<1>()?,
            0x8e | 0x96 => self.push_bytes::<8>()?, // BINBYTES8, BYTEARRAY8
            b')' => self.push(Value::Tuple(Vec::new())),
            b']' => self.push(Value::List(Vec::new())),
            b'}' => self.push(Value::Dict(Vec::new())),
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Value::Tuple(items));
            }
            0x85..=0x87 => self.push_tuple(usize::from(opcode - 0x84))?,
            b'a' => {
                let item = self.pop()?;
                self.extend_list(vec![item])?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.extend_list(items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.extend_dict(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.extend_dict(&items)?;
            }
            0x90 => drop((self.pop_to_mark()?, self.top()?)), // ADDITEMS
            0x91 => {
                self.pop_to_mark()?;
                self.push_other(); // FROZENSET
            }
            b'q' | b'r' | 0x94 => self.put(opcode)?,
            b'h' | b'j' => self.get(opcode)?,
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push_global(Class { module, name })?;
            }
            0x93 => self.stack_global()?,
            b'Q' => self.persistent()?,
            b'R' | 0x81 => self.reduce()?, // REDUCE, NEWOBJ
            0x92 => {
                self.pop()?;
                self.reduce()?; // NEWOBJ_EX
            }
            b'b' => self.build()?,
            _ => {
                return Err(format!("its pickle has the opcode {opcode:#04x} at byte {}; {ONLY_TENSORS}", self.at - 1));
            }
        }
        Ok(None)
    }

    /// Every step makes one value at most, and what makes more is charged for each: memory stays in proportion.
    fn spend(&mut self, steps: usize) -> Outcome<()> {
        let problem = || {
            format!(
                "its pickle takes more than {MAX_STEPS} steps and one for each {BYTES_PER_STEP} bytes; {ONLY_TENSORS}"
            )
        };
        self.left = self.left.checked_sub(steps).ok_or_else(problem)?;
        Ok(())
    }

    fn take(&mut self, n: usize) -> Outcome<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let taken = rest.get(..n).ok_or("its pickle is cut short; make or download it again")?;
        self.at += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Outcome<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("as many as were taken"))
    }

    /// An unsigned little-endian number of `N` bytes.
    fn unsigned<const N: usize>(&mut self) -> Outcome<u64> {
        Ok(self.array::<N>()?.iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte)))
    }

    fn counted<const N: usize>(&mut self) -> Outcome<&'a [u8]> {
        let len = self.unsigned::<N>()?;
        self.take(usize::try_from(len).unwrap_or(usize::MAX))
    }

    fn line(&mut self) -> Outcome<&'a str> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().position(|&b| b == b'\n').ok_or("its pickle is cut short within a name")?;
        let line = self.take(end)?;
        self.at += 1;
        utf8(line)
    }

    fn skip(&mut self, bytes: usize) -> Outcome<()> {
        self.take(bytes)?;
        self.push_other();
        Ok(())
    }

    fn push_other(&mut self) {
        self.stack.push(OTHER);
    }

    fn push(&mut self, value: Value<'a>) {
        self.values.push(value);
        self.stack.push(self.values.len() - 1);
    }

    fn push_int<const N: usize>(&mut self) -> Outcome<()> {
        let int = self.unsigned::<N>()?;
        self.push(Value::Int(int as i64));
        Ok(())
    }

    fn push_long<const N: usize>(&mut self) -> Outcome<()> {
        let bytes = self.counted::<N>()?;
        let value = if bytes.len() > 8 {
            Value::Long(bytes)
        } else {
            // Two's complement: the last byte has the sign.
            let sign = if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 };
            let mut wide = [sign; 8];
            wide[..bytes.len()].copy_from_slice(bytes);
            Value::Int(i64::from_le_bytes(wide))
        };
        self.push(value);
        Ok(())
    }

    fn push_text<const N: usize>(&mut self) -> Outcome<()> {
        // Python 2 has one type for texts and bytes, and Python 3 writes paths that are no UTF-8 as halves of surrogates.
        match std::str::from_utf8(self.counted::<N>()?) {
            Ok(text) => self.push(Value::Text(text)),
            Err(_) => self.push_other(),
        }
        Ok(())
    }

    fn push_bytes<const N: usize>(&mut self) -> Outcome<()> {
        self.counted::<N>()?;
        self.push_other();
        Ok(())
    }

    fn push_tuple(&mut self, items: usize) -> Outcome<()> {
        let start = self.floor().max(self.stack.len().saturating_sub(items));
        if self.stack.len() - start < items {
            return Err(underflow());
        }
        let items = self.stack.split_off(start);
        self.push(Value::Tuple(items));
        Ok(())
    }

    /// The height below which the latest mark protects the stack.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Outcome<Id> {
        if self.stack.len() <= self.floor() {
            return Err(underflow());
        }
        self.stack.pop().ok_or_else(underflow)
    }

    fn pop_to_mark(&mut self) -> Outcome<Vec<Id>> {
        let mark = self.marks.pop().ok_or_else(underflow)?;
        Ok(self.stack.split_off(mark))
    }

    fn top(&mut self) -> Outcome<Id> {
        self.stack.last().copied().ok_or_else(underflow)
    }

    fn extend_list(&mut self, items: Vec<Id>) -> Outcome<()> {
        let top = self.top()?;
        match &mut self.values[top] {
            Value::List(list) => list.extend(items),
            Value::Object(_) => {}
            _ => return Err(format!("its pickle appends to what is no list; {AGAIN}")),
        }
        Ok(())
    }

    fn extend_dict(&mut self, items: &[Id]) -> Outcome<()> {
        let top = self.top()?;
        match &mut self.values[top] {
            Value::Dict(pairs) if items.len().is_multiple_of(2) => {
                pairs.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
            }
            Value::Object(object) if items.len().is_multiple_of(2) => {
                object.pairs.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
            }
            _ => return Err(format!("its pickle sets items of what is no dict; {AGAIN}")),
        }
        Ok(())
    }

    fn put(&mut self, opcode: u8) -> Outcome<()> {
        let slot = match opcode {
            b'q' => self.unsigned::<1>()?,
            b'r' => self.unsigned::<4>()?,
            _ => self.memo.len() as u64,
        };
        let top = self.top()?;
        self.memo.insert(slot as u32, top);
        Ok(())
    }

    fn get(&mut self, opcode: u8) -> Outcome<()> {
        let slot = if opcode == b'h' { self.unsigned::<1>()? } else { self.unsigned::<4>()? };
        let id = self.memo.get(&(slot as u32)).ok_or("its pickle refers to a value that it has not made")?;
        self.stack.push(*id);
        Ok(())
    }

    fn stack_global(&mut self) -> Outcome<()> {
        let (name, module) = (self.pop()?, self.pop()?);
        let (&Value::Text(module), &Value::Text(name)) = (&self.values[module], &self.values[name]) else {
            return Err(format!("its pickle names a function by what is no text; {AGAIN}"));
        };
        self.push_global(Class { module, name })
    }

    fn push_global(&mut self, class: Class<'a>) -> Outcome<()> {
        let Class { module, name } = class;
        if module.len().max(name.len()) > MAX_KEY_BYTES {
            return Err(format!("its pickle names a class by more than {MAX_KEY_BYTES} bytes; {ONLY_TENSORS}"));
        }
        if ATTACKS.iter().any(|(known, names)| *known == module && (names.is_empty() || names.contains(&name))) {
            return Err(format!(
                "its pickle names {module}.{name}, which no weights need; nothing of it was run, but the file may be an \
                 attack: get the weights from a source you trust, best as .safetensors"
            ));
        }
        let global = Global::find(module, name).unwrap_or_else(|| {
            let next = self.classes.len();
            let index = *self.known_classes.entry(class).or_insert(next);
            if index == next {
                self.classes.push(class);
            }
            Global::Other(index)
        });
        self.push(Value::Global(global));
        Ok(())
    }

    /// A storage, named by `("storage", class, key, device, length[, view])`, or a class, by `("module", class, file, source)`.
    fn persistent(&mut self) -> Outcome<()> {
        let id = self.pop()?;
        let Value::Tuple(parts) = &self.values[id] else { return Err(bad_storage()) };
        let part = |i: usize| parts.get(i).map(|&id| &self.values[id]);
        let storage = match (part(0), part(1), part(2), part(4), part(5)) {
            (
                Some(Value::Text("storage")),
                Some(&Value::Global(Global::Storage(class))),
                Some(&Value::Text(key)),
                Some(&Value::Int(len)),
                None | Some(Value::Other),
            ) => Storage { key, class, len: usize::try_from(len).map_err(|_| bad_storage())? },
            // Of a type newer than this program: its tensors are skipped, and so is it.
            (Some(Value::Text("storage")), Some(&Value::Global(Global::Other(class))), ..) => {
                self.push_object(class);
                return Ok(());
            }
            (Some(Value::Text("module")), Some(Value::Global(_)), ..) => {
                self.stack.push(parts[1]);
                return Ok(());
            }
            _ => return Err(bad_storage()),
        };
        if storage.key.len() > MAX_KEY_BYTES {
            return Err(format!("its pickle names a storage by {} bytes; {ONLY_TENSORS}", storage.key.len()));
        }
        if *self.storages.entry(storage.key).or_insert(storage) != storage {
            return Err(format!("its pickle describes the storage {:?} in two ways; {AGAIN}", storage.key));
        }
        self.push(Value::Storage(storage.key));
        Ok(())
    }

    fn push_object(&mut self, class: usize) {
        self.push(Value::Object(Box::new(Object { class, pairs: Vec::new() })));
    }

    fn reduce(&mut self) -> Outcome<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let global = match &self.values[function] {
            Value::Global(global) => *global,
            // What a function of functions gave, such as the class that `getattr` finds in another.
            Value::Object(object) => Global::Other(object.class),
            _ => return Err(format!("its pickle calls what is no function; {ONLY_TENSORS}")),
        };
        let Value::Tuple(parts) = &self.values[arguments] else {
            return Err(format!("its pickle calls a function with what are no arguments; {ONLY_TENSORS}"));
        };
        match (global, parts.as_slice()) {
            (Global::FromType, &[function, _, arguments, ..]) => {
                match (&self.values[function], &self.values[arguments]) {
                    (&Value::Global(global @ (Global::Tensor | Global::Parameter)), Value::Tuple(parts)) => {
                        let first = first_arguments(parts);
                        self.call(global, &first)
                    }
                    _ => Err(bad_tensor()),
                }
            }
            (global, parts) => {
                let first = first_arguments(parts);
                self.call(global, &first)
            }
        }
    }

    /// Puts what a function makes of its first arguments on the stack.
    fn call(&mut self, global: Global, arguments: &[Id]) -> Outcome<()> {
        match (global, arguments) {
            (Global::OrderedDict, []) => self.push(Value::Dict(Vec::new())),
            (Global::OrderedDict, &[list]) => {
                // The list stays, so a memoised one could be copied again and again.
                self.spend(self.items(list)?.len())?;
                let pairs = self.pairs(list)?;
                self.push(Value::Dict(pairs));
            }
            (Global::TensorClass, []) => self.push(Value::EmptyTensor),
            (Global::Other(class), _) => self.push_object(class),
            // They are what their first argument is.
            (Global::Size, &[first]) | (Global::Parameter, &[first, ..]) => self.stack.push(first),
            (Global::Tensor, &[storage, offset, shape, strides, ..]) => match self.values[storage] {
                Value::Object(ref object) => self.push_object(object.class),
                _ => {
                    let view = self.view(storage, offset, shape, strides)?;
                    self.push(Value::Tensor(Box::new(view)));
                }
            },
            (_, arguments) => {
                return Err(format!("its pickle calls {global:?} with {} arguments; {ONLY_TENSORS}", arguments.len()));
            }
        }
        Ok(())
    }

    /// The pairs of a list of lists, as Python 2 pickles an `OrderedDict`.
    fn pairs(&self, list: Id) -> Outcome<Vec<(Id, Id)>> {
        let pair = |&id: &Id| match *self.items(id)? {
            [key, value] => Ok((key, value)),
            _ => Err(no_pairs()),
        };
        self.items(list)?.iter().map(pair).collect()
    }

    fn items(&self, id: Id) -> Outcome<&[Id]> {
        match &self.values[id] {
            Value::List(items) | Value::Tuple(items) => Ok(items),
            _ => Err(no_pairs()),
        }
    }

    fn view(&self, storage: Id, offset: Id, shape: Id, strides: Id) -> Outcome<View<'a>> {
        let size = |id: Id| match self.values[id] {
            Value::Int(int) => usize::try_from(int).map_err(|_| bad_tensor()),
            _ => Err(bad_tensor()),
        };
        let sizes = |id: Id| match &self.values[id] {
            Value::Tuple(items) if items.len() <= MAX_DIMS => items.iter().map(|&id| size(id)).collect(),
            _ => Err(bad_tensor()),
        };
        let Value::Storage(key) = self.values[storage] else { return Err(bad_tensor()) };
        let storage = *self.storages.get(key).ok_or_else(bad_tensor)?;
        let view = View { storage, offset: size(offset)?, shape: sizes(shape)?, strides: sizes(strides)? };
        if view.shape.len() == view.strides.len() { Ok(view) } else { Err(bad_tensor()) }
    }

    /// Attributes, such as a state dict's `_metadata`, say nothing about its tensors; those of an object of a tensor's
    /// class, `(storage, offset, shape, strides)`, are the tensor.
    fn build(&mut self) -> Outcome<()> {
        let attributes = self.pop()?;
        let top = self.top()?;
        match (&self.values[top], &self.values[attributes]) {
            (Value::Dict(_) | Value::Other | Value::Object(_), _) => Ok(()),
            (Value::EmptyTensor, Value::Tuple(parts)) => {
                let &[storage, offset, shape, strides] = parts.as_slice() else { return Err(bad_tensor()) };
                let view = self.view(storage, offset, shape, strides)?;
                self.values[top] = Value::Tensor(Box::new(view));
                Ok(())
            }
            (Value::EmptyTensor, _) => Err(bad_tensor()),
            _ => Err(format!("its pickle sets attributes of what has none; {ONLY_TENSORS}")),
        }
    }
}

/// As many arguments as any function needs that is known; a tuple of a million that is memoised is not copied each time.
fn first_arguments(arguments: &[Id]) -> Vec<Id> {
    const NEEDED: usize = 4;
    arguments.iter().copied().take(NEEDED).collect()
}

fn utf8(bytes: &[u8]) -> Outcome<&str> {
    std::str::from_utf8(bytes).map_err(|_| "its pickle holds a text that is not UTF-8".to_owned())
}

fn underflow() -> Fault {
    format!("its pickle takes more values than it has made; {AGAIN}")
}

fn bad_tensor() -> Fault {
    format!("its pickle describes a tensor that is none; {AGAIN}")
}

fn no_pairs() -> Fault {
    format!("its pickle makes a dict of what are no pairs; {AGAIN}")
}

fn bad_storage() -> Fault {
    format!("its pickle names a storage of an unknown kind; {ONLY_TENSORS}")
}
