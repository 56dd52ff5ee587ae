package service

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"sync"
	"time"
)

// Serve answers HTTPS requests on a listener until ctx ends; it then lets running requests finish for up to two seconds.
// It always closes l. Its error is nil if ctx has ended.
func (s *Service) Serve(ctx context.Context, l net.Listener) error {
	conns := &connections{limit: s.limits.Connections, idle: map[net.Conn]time.Time{}, all: map[net.Conn]bool{}}
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	server := &http.Server{
		Handler:           s,
		TLSConfig:         &tls.Config{MinVersion: tls.VersionTLS12, GetConfigForClient: s.certs.configFor, GetCertificate: s.certs.certificate},
		ReadHeaderTimeout: min(10*time.Second, s.limits.RequestTime),
		ReadTimeout:       s.limits.RequestTime,
		WriteTimeout:      2 * s.limits.RequestTime,
		IdleTimeout:       s.limits.IdleTime,
		MaxHeaderBytes:    s.limits.Header,
		Protocols:         &protocols,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: 16, MaxReadFrameSize: 16 << 10},
		ConnState:         conns.changed,
		ErrorLog:          log.New(debugWriter{s.log}, "", 0),
		BaseContext:       func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
	}
	if a, ok := l.Addr().(*net.TCPAddr); ok {
		s.certs.mu.Lock()
		s.certs.port = a.Port
		s.certs.mu.Unlock()
	}
	delivering, endDeliveries := context.WithCancel(ctx)
	wait := s.subs.serve(delivering)
	defer wait()
	var reporting sync.WaitGroup
	defer reporting.Wait()
	if s.certs.root != "" { // or else nobody could switch it off
		reporting.Go(func() { s.discovery.run(delivering) })
	}
	reporting.Go(func() { s.freeze.Do(s.finish); s.telemetry.run(delivering) })
	defer endDeliveries()
	server.RegisterOnShutdown(s.subs.endStreams)
	served := make(chan error, 1)
	go func() { served <- server.ServeTLS(l, "", "") }()
	select {
	case err := <-served:
		return fmt.Errorf("serve Redfish: %w", err)
	case <-ctx.Done():
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if server.Shutdown(last) != nil {
		server.Close()
	}
	for _, t := range s.tasks.list() {
		t.cancel()
	}
	<-served
	return nil
}

// ListenAndServe is Serve on a TCP address such as ":443".
func (s *Service) ListenAndServe(ctx context.Context, addr string) error {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if err != nil {
		return fmt.Errorf("serve Redfish: %w", err)
	}
	return s.Serve(ctx, l)
}

// debugWriter takes what net/http has to say, which is about broken handshakes mostly: anybody can cause those.
type debugWriter struct{ log *slog.Logger }

func (w debugWriter) Write(b []byte) (int, error) {
	w.log.Debug("http server", "says", string(b))
	return len(b), nil
}

// connections bounds the connections of a server. Above the bound, the one goes that has been waiting longest without a
// request, so that whoever holds many idle connections does not keep others out.
type connections struct {
	limit int

	mu   sync.Mutex // guards what follows
	all  map[net.Conn]bool
	idle map[net.Conn]time.Time // since when
}

func (c *connections) changed(conn net.Conn, state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch state {
	case http.StateNew:
		if len(c.all) >= c.limit {
			c.drop(conn)
		}
		c.all[conn] = true
		c.idle[conn] = time.Now()
	case http.StateIdle:
		c.idle[conn] = time.Now()
	case http.StateActive:
		delete(c.idle, conn)
	case http.StateClosed, http.StateHijacked:
		delete(c.idle, conn)
		delete(c.all, conn)
	}
}

// drop closes the connection that has been idle longest, or else the new one.
func (c *connections) drop(fresh net.Conn) {
	victim, since := fresh, time.Now()
	for conn, t := range c.idle {
		if t.Before(since) {
			victim, since = conn, t
		}
	}
	delete(c.idle, victim)
	delete(c.all, victim)
	// Closing may write to a peer that does not read.
	go victim.Close()
}

func selfSigned(names []string, now time.Time) (certPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, nil, err
	}
	// A device's clock may be years behind at its first start, and ahead later.
	from := time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)
	if now.Before(from) {
		now = from
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "Redfish service"}, NotBefore: from, NotAfter: now.AddDate(10, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IsCA: true, BasicConstraintsValid: true, // so that clients can take it as their CA
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), nil
}
