/** Bridges between stores and rendering. */

import { useEffect, useRef, useState } from "./vendor/htm-preact.js";

/** A store's value; the part is rendered again when it changes. */
export function useStore(store) {
  const [value, setValue] = useState(store.get());
  useEffect(() => {
    setValue(store.get());
    return store.subscribe((next) => setValue(() => next));
  }, [store]);
  return value;
}

/** An object URL of a Blob for as long as the part shows it. */
export function useUrl(blob) {
  const [url, setUrl] = useState(null);
  useEffect(() => {
    if (!blob) return setUrl(null);
    const fresh = URL.createObjectURL(blob);
    setUrl(fresh);
    return () => URL.revokeObjectURL(fresh);
  }, [blob]);
  return url;
}

/** A ref whose element gets the focus when the part appears. */
export function useFocus(enabled = true) {
  const ref = useRef();
  useEffect(() => {
    if (enabled) ref.current?.focus({ preventScroll: true });
  }, []);
  return ref;
}
