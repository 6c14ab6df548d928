//! What values cost a chat template: all that they hold is paid for in fuel before it is walked through.

use minijinja::value::{Rest, Value, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, filters, functions, tests};

use crate::template_guard::{HELD, SETTLED, SETTLED_ATTRIBUTE, WEIGHED};

/// Values nested deeper than this are refused.
pub(crate) const MAX_DEPTH: usize = 128;
/// Bytes that a unit of fuel pays for.
const BYTES_PER_FUEL: usize = 64;
/// References to values that a unit of fuel copies.
const COPIES_PER_FUEL: usize = 16;

fn invalid(message: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

/// Pays for everything that a value holds: lists that hold themselves over and over are small in memory, but as text
/// they are endless.
pub(crate) fn charge_nested(state: &State<'_, '_>, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(invalid("a value is nested too deep"));
    }
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => value.try_iter()?.try_for_each(|item| {
            state.consume_fuel(1)?;
            charge_nested(state, &item, depth + 1)
        }),
        ValueKind::Map => value.try_iter()?.try_for_each(|key| {
            state.consume_fuel(1)?;
            charge_nested(state, &key, depth + 1)?;
            charge_nested(state, &value.get_item(&key)?, depth + 1)
        }),
        ValueKind::String if depth > 0 => match value.as_str().map_or(0, str::len) / BYTES_PER_FUEL {
            0 => Ok(()),
            fuel => state.consume_fuel(fuel as u64),
        },
        _ => Ok(()),
    }
}

/// A namespace is the one value that can be changed, and so the one that could come to hold itself.
fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace"))
}

fn refuse_namespaces(value: &Value) -> Result<(), Error> {
    const MESSAGE: &str = "a namespace cannot be kept in another value";
    let held = match value.kind() {
        ValueKind::Seq => value.try_iter()?.any(|item| is_namespace(&item)),
        ValueKind::Map => value.try_iter()?.any(|key| value.get_item(&key).is_ok_and(|item| is_namespace(&item))),
        _ => false,
    };
    if held { Err(invalid(MESSAGE)) } else { Ok(()) }
}

fn held(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    charge_nested(state, &value, 0)?;
    refuse_namespaces(&value)?;
    Ok(value)
}

fn weighed(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    charge_nested(state, &value, 0)?;
    Ok(value)
}

/// A slice of a slice of a slice is looked up level by level; kept in a variable, it becomes a list.
fn settled(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    let is_lazy = value.kind() == ValueKind::Iterable
        || value.as_object().is_some_and(|object| object.type_name().ends_with("::MergeSeq"));
    if !is_lazy {
        return Ok(value);
    }
    let mut items = Vec::new();
    for item in value.try_iter()? {
        if items.len() % COPIES_PER_FUEL == 0 {
            state.consume_fuel(1)?;
        }
        items.push(item);
    }
    Ok(Value::from(items))
}

fn settled_attribute(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    if is_namespace(&value) {
        return Err(invalid("a namespace cannot be kept in a namespace"));
    }
    settled(state, value)
}

/// Adds the guards that [`crate::template_guard`] writes into the source, and puts one before everything built in that
/// compares, sorts or nests values.
pub(crate) fn add_guards(environment: &mut Environment<'static>) {
    environment.add_filter(HELD, held);
    environment.add_filter(WEIGHED, weighed);
    environment.add_filter(SETTLED, settled);
    environment.add_filter(SETTLED_ATTRIBUTE, settled_attribute);

    environment.add_filter("__sort", filters::sort);
    environment.add_filter("__unique", filters::unique);
    environment.add_filter("__min", filters::min);
    environment.add_filter("__max", filters::max);
    environment.add_filter("__dictsort", filters::dictsort);
    environment.add_filter("__groupby", filters::groupby);
    environment.add_filter("__batch", filters::batch);
    environment.add_filter("__slice", filters::slice);
    environment.add_filter("__zip", filters::zip);
    environment.add_filter("__items", filters::items);
    environment.add_filter("__join", filters::join);
    environment.add_filter("__upper", filters::upper);
    for (name, inner) in [
        ("sort", "__sort"),
        ("unique", "__unique"),
        ("min", "__min"),
        ("max", "__max"),
        ("dictsort", "__dictsort"),
        ("groupby", "__groupby"),
        ("batch", "__batch"),
        ("slice", "__slice"),
        ("zip", "__zip"),
        ("items", "__items"),
        ("join", "__join"),
        ("upper", "__upper"),
    ] {
        environment.add_filter(name, move |state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            args.iter().try_for_each(|arg| charge_nested(state, arg, 0))?;
            state.apply_filter(inner, &args)
        });
    }

    environment.add_test("__eq", tests::is_eq);
    environment.add_test("__ne", tests::is_ne);
    environment.add_test("__lt", tests::is_lt);
    environment.add_test("__le", tests::is_le);
    environment.add_test("__gt", tests::is_gt);
    environment.add_test("__ge", tests::is_ge);
    environment.add_test("__in", tests::is_in);
    for (inner, names) in [
        ("__eq", &["eq", "equalto", "=="][..]),
        ("__ne", &["ne", "!="]),
        ("__lt", &["lt", "lessthan", "<"]),
        ("__le", &["le", "<="]),
        ("__gt", &["gt", "greaterthan", ">"]),
        ("__ge", &["ge", ">="]),
        ("__in", &["in"]),
    ] {
        for name in names {
            environment.add_test(*name, move |state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>| {
                let args = args.into_values();
                args.iter().try_for_each(|arg| charge_nested(state, arg, 0))?;
                state.perform_test(inner, &args)
            });
        }
    }

    environment.add_function("__namespace", functions::namespace);
    environment.add_function("__dict", functions::dict);
    for (name, inner) in [("namespace", "__namespace"), ("dict", "__dict")] {
        environment.add_function(name, move |state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            for arg in &args {
                charge_nested(state, arg, 0)?;
                refuse_namespaces(arg)?;
            }
            let function = state.lookup(inner).ok_or_else(|| Error::from(ErrorKind::UnknownFunction))?;
            function.call(state, &args)
        });
    }
}
